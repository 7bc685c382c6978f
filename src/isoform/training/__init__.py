"""The one training loop and what stands round it: optimisers, schedules, trackers, guards, the plan."""
