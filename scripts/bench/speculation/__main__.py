"""python -m scripts.bench.speculation"""

from scripts.bench.speculation.run import main

main()
