from . import (
    adapt as adapt,
)
from . import (
    axes as axes,
)
from . import (
    checkpoint as checkpoint,
)
from . import (
    compress as compress,
)
from . import (
    contrib as contrib,
)
from . import (
    data as data,
)
from . import (
    distributed as distributed,
)
from . import (
    errors as errors,
)
from . import (
    evaluate as evaluate,
)
from . import (
    files as files,
)
from . import (
    generation as generation,
)
from . import (
    hub as hub,
)
from . import (
    layers as layers,
)
from . import (
    leaves as leaves,
)
from . import (
    losses as losses,
)
from . import (
    models as models,
)
from . import (
    ops as ops,
)
from . import (
    optim as optim,
)
from . import (
    plan as plan,
)
from . import (
    progress as progress,
)
from . import (
    report as report,
)
from . import (
    schema as schema,
)
from . import (
    sharding as sharding,
)
from . import (
    train as train,
)
from . import (
    tree as tree,
)
from .errors import InputError as InputError
from .generation.generate import generate as generate
from .hub import Bundle as Bundle
from .hub import from_pretrained as from_pretrained
from .models import Model as Model
from .models import Output as Output
from .models.sentences import embed_texts as embed_texts
from .ops import Policy as Policy
from .train import TrainConfig as TrainConfig
from .train import fit as fit

__version__: str
