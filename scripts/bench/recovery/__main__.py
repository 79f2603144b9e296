"""python -m scripts.bench.recovery"""

from scripts.bench.recovery.run import main

main()
