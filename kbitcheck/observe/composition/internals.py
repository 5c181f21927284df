"""The private name of Python that processes of compositions need: a fork ends without what its parent would do at its end."""

import os

end = os._exit
