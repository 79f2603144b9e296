"""Front: from the user's input to the user's output.

flags.py                           what is asked, and where the answers go
front_door.py                      serves a prompt, a batch of lines, or HTTP clients through http/
process.py                         the router's process beside a unified job; exit_status.py says how a process ends
client.py, tracked.py              what a door gives to the router, and what the router knows of it
parse.py, rules.py                 a request's fields to a request; generation_defaults.py has the checkpoint's
tokenizer.py                       text and messages to tokens; tokenizer_files.py and tiktoken_file.py read the folder
messages.py, chat_template.py      messages to text, in a process of its own
text_stream.py                     tokens to text, up to a stop string
lines.py, source.py, jsonl.py      input, read when needed; output.py and answer.py write the answers
expert_rows.py                     an answer's chosen experts
router.py                          gives requests to replicas, and moves them; trials.py finds one that kills jobs
routing.py                         which replicas a request gets; recent.py remembers, spread.py sums up
apart.py                           which jobs get no requests together, because their link failed
fleet.py, replica.py               which replicas live, and how loaded each is
metrics.py, histogram.py           what is counted; progress.py prints lines about it, http/ serves it to Prometheus
streams.py                         the process's own stdout, stderr and limit of open files

May import disagg/control/, and request.py, config.py and interrupt.py of disagg/. Knows no engine and no link.
"""
