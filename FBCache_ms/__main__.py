"""``python -m FBCache_ms`` is the command fbcache."""

import sys

from FBCache_ms.eval.fbcache import main

sys.exit(main(module=__name__))
