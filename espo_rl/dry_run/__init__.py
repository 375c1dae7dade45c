"""`espo_rl.run --dry-run`: is the recipe whole, will it fit, what will it take?"""
