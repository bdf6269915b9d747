"""What DRSM decides, without doing it: pure functions and tables of (state, input, now).

No await, clock, randomness or driver in here; time comes in as seconds of the caller's own clock,
random tokens come in as arguments, and what is to be done goes out as data (`writes`, `events`).
"""
