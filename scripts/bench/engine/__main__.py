"""python -m scripts.bench.engine"""

import gc

from scripts.bench.engine.run import main

main()
gc.collect()  # the engine is a cycle that holds the process group, whose threads must end before the interpreter
