"""python -m scripts.bench.engine"""

import gc

from scripts.bench.engine.run import main

main()
gc.collect()  # frees the engine, a reference cycle: its process group's threads must end before the interpreter
