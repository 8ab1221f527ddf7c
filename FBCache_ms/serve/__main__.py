"""``python -m FBCache_ms.serve`` is ``fbcache serve``."""

import sys

from FBCache_ms.eval.serve import main

sys.exit(main())
