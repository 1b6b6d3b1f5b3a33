"A device that has no float64, such as Apple's MPS, played by the CPU: `with NoFloat64(): …` runs there."
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

MPS = torch.device("mps")
FREE = {"cpu", "to", "item", "tolist", "copy_"}   # may have arguments on both


def tensors(x):
    "All tensors in nested arguments."
    if isinstance(x, torch.Tensor): yield x
    elif isinstance(x, (list, tuple)):
        for part in x: yield from tensors(part)
    elif isinstance(x, dict):
        for part in x.values(): yield from tensors(part)


class NoFloat64(TorchFunctionMode):
    """Every tensor is on the device unless it was made on the CPU or moved there, in this thread.

    What is on the device says that its `device` is mps. A float64 tensor on it, a numpy array of it, and an operation
    between the two places are errors, as on the real one."""
    def __init__(self):
        super().__init__()
        self.on_cpu = WeakIdKeyDictionary()

    def mark(self, result):
        for t in tensors(result): self.on_cpu[t] = True
        return result

    def is_cpu(self, t): return t in self.on_cpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        given = list(tensors(args)) + list(tensors(kwargs))
        if name == "__get__" and given and getattr(func, "__self__", None) is torch.Tensor.device:
            return torch.device("cpu") if self.is_cpu(given[0]) else MPS
        if name == "numpy" and not self.is_cpu(given[0]): raise TypeError("a tensor on mps is no numpy array")
        wanted = self.place(name, args, kwargs)
        places = {self.is_cpu(t) for t in given if t.ndim}
        if len(places) == 2 and name not in FREE and not name.startswith("__"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        result = func(*self.plain(args), **{k: self.plain(v) for k, v in kwargs.items()})
        cpu = wanted.type == "cpu" if wanted is not None else all(map(self.is_cpu, given)) if given else True
        moved = cpu and any(result is t and not self.is_cpu(t) for t in given)
        if moved: result = result.view_as(result)   # another tensor, as moving makes one
        if cpu: self.mark(result)
        else:
            for t in tensors(result):
                self.on_cpu.pop(t, None)
                if t.dtype == torch.float64: raise TypeError(f"{name}: MPS has no float64")
        return result

    def place(self, name, args, kwargs):
        "The device that a call asks for, None where it does not."
        if name == "cpu": return torch.device("cpu")
        device = kwargs.get("device")
        if name == "to":
            for a in args[1:]:
                if isinstance(a, torch.Tensor): return torch.device("cpu") if self.is_cpu(a) else MPS
                if isinstance(a, (str, torch.device)): device = a
        return None if device is None else torch.device(device)

    def plain(self, x):
        "The arguments with the CPU in place of the device."
        if isinstance(x, torch.device) and x.type == "mps": return torch.device("cpu")
        if isinstance(x, str) and x == "mps": return "cpu"
        return type(x)(map(self.plain, x)) if type(x) in (list, tuple) else x
