"""The roles on Ray (generators, reward service, learners); it knows `trainers` and the engines, never `cluster`."""
