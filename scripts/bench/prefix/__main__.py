"""python -m scripts.bench.prefix"""

from scripts.bench.prefix.run import main

main()
