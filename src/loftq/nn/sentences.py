"""SentenceTransformers over packed models: it takes the dtype of the first parameter for the model's.

That may be the dtype of codes, if the table of words is packed.
"""

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from loftq.nn.layers import Packed
from loftq.patching import inside, patches

# Whether a model is being made, and reads the dtype of its transformer.
_made: ContextVar[bool] = ContextVar("made", default=False)


def tell_dtype(models: Any) -> None:
    """Let ``model.dtype`` be that of the dense parameters, also while the model is made.

    Args:
        models: the module ``sentence_transformers.base.model``.
    """

    @patches(models.BaseModel, "__init__")
    def make_in_dtype(make: Any, self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with inside(_made):
            make(self, *args, **kwargs)

    of_first = models.BaseModel.dtype

    def dtype(self: nn.Module) -> Any:
        packed = next((m for m in self.modules() if isinstance(m, Packed)), None)
        return of_first.fget(self) if packed is None else packed.compute_dtype

    models.BaseModel.dtype = property(dtype, doc=of_first.__doc__)


def give_dense_first(modules: Any) -> None:
    """Let a transformer's ``parameters()`` begin with dense ones while a model is made of it, and only then.

    Args:
        modules: the module ``sentence_transformers.base.modules.transformer``.
    """

    @patches(modules.Transformer, "parameters")
    def parameters(every: Any, self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
        found = every(self, recurse)
        if not _made.get():
            return found
        codes = {id(tensor) for m in self.modules() if isinstance(m, Packed) for tensor in m.stored}
        return iter(sorted(found, key=lambda parameter: id(parameter) in codes))
