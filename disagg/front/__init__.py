"""Front: from what a user gives to what a user gets.

front_door.py                      a prompt or a batch of lines, and where the answers go
parse.py, tokenizer.py             a line to a request; chat_template.py renders in a process of its own
lines.py, source.py, jsonl.py      input, read as it is needed; output.py and answer.py are the other end
router.py                          pairs requests with replicas; fleet.py knows who is there, metrics.py counts
streams.py                         the process's own stdout and stderr

May import disagg/control/, disagg/request.py and disagg/config.py. Knows no engine and no link.
"""
