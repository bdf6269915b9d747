"""The story in one terminal: real servers, real pods as processes, a real SIGKILL."""
