"""HTTP: the front door over the network. Needs the packages of the extra `serve`, and is imported only when asked for.

metrics.py    the router's and the replicas' numbers in Prometheus' text form
"""
