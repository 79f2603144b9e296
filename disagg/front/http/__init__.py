"""HTTP: the front door over the network. Needs the packages of the extra `serve`, and is imported only when asked for.

server.py       the event loop: the router's turns and uvicorn, in one thread
protocol.py     uvicorn's connections, with limits for slow and for large headers
app.py          the paths, and who may use them
body.py         a request's body, within limits
fields.py       OpenAI's fields -> the fields of a line of a batch
generate.py     a request on its way: its prompts at the router, its answer whole or streamed
exchange.py     the clients of its prompts, its time limits, and the client that leaves
completions.py, chat.py    the two shapes of an answer
token_text.py   tokens as log probabilities show them
openapi.py      the description of all this at /openapi.json
errors.py       errors in OpenAI's shape
limits.py       time limits and keys, from the flags
deployment.py, page.html    a page to try the model, and the picture of the deployment on it
metrics.py      the router's and the replicas' numbers in Prometheus' text form
"""
