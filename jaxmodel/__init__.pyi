from . import (
    adapt as adapt,
    axes as axes,
    checkpoint as checkpoint,
    compress as compress,
    contrib as contrib,
    data as data,
    distributed as distributed,
    errors as errors,
    evaluate as evaluate,
    files as files,
    generation as generation,
    hub as hub,
    layers as layers,
    leaves as leaves,
    limits as limits,
    losses as losses,
    models as models,
    ops as ops,
    optim as optim,
    plan as plan,
    progress as progress,
    report as report,
    rng as rng,
    schema as schema,
    sharding as sharding,
    train as train,
    tree as tree,
)
from .errors import InputError as InputError
from .generation.generate import generate as generate
from .hub import Bundle as Bundle, from_pretrained as from_pretrained
from .models import Model as Model, Output as Output
from .models.sentences import embed_texts as embed_texts
from .ops import Policy as Policy
from .train import TrainConfig as TrainConfig, fit as fit

__version__: str
