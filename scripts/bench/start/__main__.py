"""python -m scripts.bench.start"""

from scripts.bench.start.run import main

main()
