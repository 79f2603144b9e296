"""python -m scripts.bench.handoff"""

import sys

from scripts.bench.handoff.run import main

sys.exit(main())
