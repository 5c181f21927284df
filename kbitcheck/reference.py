"""The reference preparation, and the oracle that conformance is judged by. Importing this imports torch.

This is the package ``kbitcheck_reference`` under a name that is easy to remember.
"""

from kbitcheck_reference import *  # noqa: F403
from kbitcheck_reference import __all__ as __all__
