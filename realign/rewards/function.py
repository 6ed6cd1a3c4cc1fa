"""`function:MODULE:NAME`: any Python function as a reward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from torch import Tensor

from realign.rewards.base import Reward, RewardError, Scored
from realign.rewards.pictures import bring_to_host

Function = Callable[[Sequence[Scored]], "Sequence[float] | Tensor"]


class FunctionReward(Reward):
    """Calls a function that takes a sequence of `Scored` and returns one number for each.

    Its pictures are PIL, whoever scores: `realign score`, or training, which has them on a device.

    Args:
        target: "package.module:name", importable.
    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, target: str) -> None:
        self.name = f"function:{target}"
        self._function = find_function(target)

    def score(self, samples: Sequence[Scored]) -> Tensor:
        """What the function gives."""
        on_host = [bring_to_host(sample) for sample in samples]
        try:
            values = self._function(on_host)
        except RewardError:
            raise
        except Exception as error:  # somebody else's code: it may raise anything
            names = ", ".join(repr(sample.name) for sample in samples[:3])
            what = f"raised {type(error).__name__}: {error}"
            raise RewardError(
                f"reward {self.name}: {what}; samples {names}{', ...' if len(samples) > 3 else ''}; "
                "mend the function"
            ) from error
        return self.gather(values, samples)


def find_function(target: str) -> Function:
    """The function that "package.module:name" points at. Raises ValueError."""
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"function {target!r}: must be MODULE:NAME, such as my_rewards:brightness")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"function {target!r}: module {module_name!r} cannot be imported ({error}); "
            "install it, or put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"function {target!r}: {module_name} has no function {name!r}; correct the name")
    return function
