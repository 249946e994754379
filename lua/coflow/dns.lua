-- coflow.dns: names to addresses and back. The operations are in C (dns.c).
--
-- SPDX-License-Identifier: MIT

return require("coflow.core").open_dns()
