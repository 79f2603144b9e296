"""python -m scripts.bench.kernels"""

from scripts.bench.kernels.run import main

main()
