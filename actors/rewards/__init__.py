"""The reward service: reward models on Ray Serve, functions in processes, HTTP; weighted and normalized scores."""
