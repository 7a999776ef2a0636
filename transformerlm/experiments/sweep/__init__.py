"""Many trainings that differ in some settings: which they are, who trains them when, and what came of it."""
