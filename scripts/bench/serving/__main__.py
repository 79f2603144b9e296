"""python -m scripts.bench.serving"""

from scripts.bench.serving.run import main

main()
