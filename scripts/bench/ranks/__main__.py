"""python -m scripts.bench.ranks"""

from scripts.bench.ranks.run import main

main()
