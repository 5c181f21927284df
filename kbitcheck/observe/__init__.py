"""From a case to facts: stages, probes, float64 twins, forecast."""
