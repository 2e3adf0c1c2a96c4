"""Be a `peft.PeftModel` where Hugging Face's clients ask for one. peft is imported here only, and only when it is due.

transformers' Trainer accepts a quantized base, saves adapter files rather than the whole model, and resumes from them,
if `isinstance(model, peft.PeftModel)`; accelerate and TRL ask the same. So a model made while transformers or peft is
loaded gets a class that inherits from ours first and from PEFT's second. A process that has imported neither has nobody
who asks, and is spared PEFT's import (several seconds).
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from torch import nn

from peftkern.tuners.trainable_tokens import TrainableTokensWrapper
from peftkern.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peftkern.utils.module_tree import modules_of
from peftkern.utils.other import ModulesToSaveWrapper


def bridged_class(cls: type) -> type:
    """`cls`, or the subclass of it that is also PEFT's class of the same name.

    `cls` itself is returned where neither transformers nor peft is loaded, or peft is not installed.

    Warns:
        UserWarning: peft is installed but its import fails.
    """
    if "transformers" not in sys.modules and "peft" not in sys.modules:
        return cls
    try:
        import peft
    except ImportError as error:
        if error.name == "peft" and isinstance(error, ModuleNotFoundError):
            return cls  # not installed
        warnings.warn(
            f"peft is installed but cannot be imported ({error}): transformers' Trainer will treat this model as a "
            "plain module and save it whole.",
            stacklevel=4,
        )
        return cls
    return cls if issubclass(cls, peft.PeftModel) else _combine(cls, _counterpart(cls))


def bridge_wrappers(model: nn.Module) -> None:
    """Let PEFT's functions see what wraps modules of a bridged model as their own, to save and load it."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return
    for module in modules_of(model):
        kind: Any = type(module)
        if kind in (ModulesToSaveWrapper, TrainableTokensWrapper):
            module.__class__ = _combine(kind, getattr(peft.utils.other, kind.__name__))


def _counterpart(cls: type) -> type:
    """PEFT's class of the same name as `cls`, or as its nearest base that has one."""
    import peft

    names = (base.__name__ for base in cls.__mro__ if base.__module__.startswith("peftkern."))
    return next(getattr(peft, name) for name in names if hasattr(peft, name))


@functools.cache
def _combine(cls: type, theirs: type) -> type:
    """The class under `cls` and `theirs`; one for each pair, so that equal models have equal types."""
    from peft.tuners import tuners_utils

    # PEFT's functions walk a model by these two abstract classes; registering makes isinstance true and nothing else.
    tuners_utils.BaseTunerLayer.register(BaseTunerLayer)
    tuners_utils.BaseTuner.register(BaseTuner)
    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")} | {"__reduce__": _reduce}
    return type(cls.__name__, (cls, theirs), body)


def _reduce(self: Any) -> tuple[Any, ...]:
    """Pickle and copy by our class: the combined one has no name to be found by."""
    plain, theirs = type(self).__bases__
    return _rebuild, (plain, theirs), self.__dict__


def _rebuild(cls: type, theirs: type) -> Any:
    made: Any = _combine(cls, theirs)
    return made.__new__(made)
