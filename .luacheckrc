std = "lua54"
max_line_length = 120
self = false -- methods need not use their self

files["spec"] = { std = "+busted" }
files["examples/*_spec.lua"] = { std = "+busted" }
files[".ci/specs.lua"] = { std = "+busted", read_globals = { debug = { fields = { "stress" } } } }

-- Declarations without bodies: all that is there is unused.
files["lua/coflow/meta.lua"] = { unused = false }
