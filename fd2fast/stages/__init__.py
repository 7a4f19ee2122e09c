"""The stages: each run(config, out, *artifacts) -> Artifact; none imports another."""
