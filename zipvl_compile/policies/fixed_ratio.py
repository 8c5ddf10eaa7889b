"""The paper's scores under one budget for all layers and prompts: the ablation of the adaptive ratio.

p = ceil(keep_ratio n)
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(keep_ratio=0.4)
