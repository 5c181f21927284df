"""Plain data: results, rules, reports, facts, cases. Standard library only."""
