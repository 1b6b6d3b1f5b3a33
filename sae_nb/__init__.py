"Sparse autoencoders on language models. The public names are looked up when first used: `import sae_nb` costs nothing."

__version__ = "0.0.1"

import sys
from importlib import import_module
from types import ModuleType

_MODULES = dict(load_lm="lm", load_text="text", SAE="sae", SAEConfig="sae", train="train", TrainConfig="train", run="runs",
                RunConfig="runs", sweep="sweep", measure="metrics", evaluate="suite", fit_law="scaling", explorer="explore")
__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name not in _MODULES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__(): return sorted({*globals(), *_MODULES})


class _Callable(ModuleType):
    "A module with a function of its own name, which it calls."
    def __call__(self, *args, **kwargs): return vars(self)[self.__name__.rpartition(".")[2]](*args, **kwargs)


class _Package(ModuleType):
    "This package: `sae_nb.train` and `sae_nb.sweep` are modules, and can be called as their functions."
    def __setattr__(self, name, value):
        if isinstance(value, ModuleType) and _MODULES.get(name) == name: value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
