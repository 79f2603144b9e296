"""Handoff: KV pages from a prefill rank to a decode rank.

protocol.py                        the messages, and the room: one request's place in the handoff
link.py                            one prefill rank paired with one decode rank; its ends are send_link.py and
                                   receive_link.py, and links.py has all those of a rank
connect.py, pipe.py                how the two ends meet, and what they speak over
transport.py, transports/          the contract of what moves the bytes, and the libraries that fulfil it
credits.py                         how many transfers are under way

May import disagg/control/ and disagg/request.py. Knows no engine.
"""
