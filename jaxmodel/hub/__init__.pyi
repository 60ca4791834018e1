from .adapters import add_adapters as add_adapters, save_adapters as save_adapters
from .bundle import Bundle as Bundle, need_processor as need_processor
from .images import ImageProcessor as ImageProcessor
from .pretrained import from_pretrained as from_pretrained
from .tokenizer import Tokenizer as Tokenizer, train_bpe as train_bpe
