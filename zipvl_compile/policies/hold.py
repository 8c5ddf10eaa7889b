"""The paper's selection; a token that is not kept takes the attention output of the kept token before it.

    o[i] = o[max {t kept : t <= i}]

It costs a gather and no multiplication, and every projection is still computed for kept tokens only. Neighbouring
tokens attend alike, so that a neighbour's output is nearer to the right one than zero is: about half of what rows of
zeros lose comes back.
"""

from zipvl_compile.passes.policy import Policy

POLICY = Policy(unselected="hold")
