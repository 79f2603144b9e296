"""python -m scripts.bench.front"""

from scripts.bench.front.run import main

main()
