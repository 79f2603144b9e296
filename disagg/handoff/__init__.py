"""Handoff: KV pages from a prefill rank to a decode rank.

protocol.py                        the messages, and the room: the state of one request's handoff
link.py, links.py                  one prefill rank paired with one decode rank; all links of a rank
send_link.py, receive_link.py      the two ends of a link
connect.py, pipe.py                how the two ends meet, and how they exchange messages
transport.py, transports/          the interface of a transport, which moves the bytes, and its implementations
credits.py                         the limit on transfers in flight

May import disagg/control/ and disagg/request.py. Knows nothing of the engine.
"""
