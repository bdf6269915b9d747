"""The wire protocol, version 1: what is said on which subject, and in which bytes.

Shared by the SDK and the agent, and free of any connection: `subjects` spells every subject,
`messages` names every field, `codec` turns messages into bytes and back, `definition` says what a
pool's numbers mean, `checksum` how two sides compare what they hold.
"""
