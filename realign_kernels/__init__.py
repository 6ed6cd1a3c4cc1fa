"""Public ops of realign: one folder per op, each defined by its `reference.py`.

`api.py` of a folder holds the signature, the formula, the checks and the dispatch (`impl=`). The compiled
extension, where there is one, is reached through `realign_kernels.native`.
"""

from realign_kernels.apply_rope.api import apply_rope
from realign_kernels.flow_step.api import flow_step
from realign_kernels.guided_flow_step.api import guided_flow_step
from realign_kernels.guided_velocity.api import guided_velocity
from realign_kernels.rms_norm.api import rms_norm
from realign_kernels.swiglu.api import swiglu

__all__ = ["apply_rope", "flow_step", "guided_flow_step", "guided_velocity", "rms_norm", "swiglu"]
