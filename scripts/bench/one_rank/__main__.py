"""python -m scripts.bench.one_rank"""

from scripts.bench.one_rank.run import main

main()
