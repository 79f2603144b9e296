"""Control: messages between the router and the ranks, and how they survive a broken connection.

messages.py   the messages, typed; session.py numbers them and resends what was lost
ports.py      their two ends over ZeroMQ; address.py parses and resolves addresses
pulse.py      the beat of every rank

May import disagg/request.py. Knows no engine.
"""
