"""NATS as the agent uses it. The only room of the agent that knows nats-py."""
