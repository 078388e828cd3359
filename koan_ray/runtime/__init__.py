"""Where coordinator, broker and job actors run: `local` in this process, `ray` on a Ray cluster."""
