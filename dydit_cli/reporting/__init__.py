"""One page of HTML that explains a model: what it executes, what that costs, what it draws, where it comes from."""
