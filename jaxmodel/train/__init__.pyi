from .config import TrainConfig as TrainConfig, make_optimizer as make_optimizer
from .exchange import GradientCompression as GradientCompression
from .loop import fit as fit
from .options import TrainOptions as TrainOptions
from .placing import environment as environment, gather as gather
from .program import Program as Program
from .rate_search import find_lr as find_lr
from .state import TrainState as TrainState, averaged as averaged
from .statistics import recalibrate_batch_norm as recalibrate_batch_norm
