"""The Lua scripts of `RedisStore`. Each is one atomic step; they need no command that is newer than Redis 5.

Times are those of the server's clock, in microseconds; a double holds today's to a quarter of one. Numbers are kept and
returned as text with 17 digits, because Redis would truncate them to integers.

A queue is two sorted sets. `queue` has the order of arrival, and `seen` the time by which a waiter has to ask again; one that
has not is forgotten. A caller may go if there is enough for all ahead of it, too: if only the first could, each would have to
wait until the one ahead polls. Every key expires once it no longer matters.
"""

from __future__ import annotations

from hashlib import sha1


class Script:
    """A script, and the name by which a server that has seen it knows it."""

    def __init__(self, text: str) -> None:
        self.text = _COMMON + text
        self.sha = sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_COMMON = """
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function exact(number)
  return string.format('%.17g', number)
end

local function milliseconds(us)
  return exact(math.max(1, math.min(math.ceil(us / 1000) + 1, 1e13)))
end

-- Keep keys alive for at least so many microseconds more. None of them outlives the first.
local function keep(us, first, ...)
  if redis.call('PTTL', first) >= us / 1000 then return end
  for _, key in ipairs({first, ...}) do
    redis.call('PEXPIRE', key, milliseconds(2 * us)) -- for longer, so that this is not needed each time
  end
end

-- Forget those who have not asked again in time, and return how many wait.
local function count_waiting(now, queue, seen, costs)
  local count = redis.call('ZCARD', queue)
  if count == 0 then return 0 end
  if count ~= redis.call('ZCARD', seen) then -- the server was out of memory, and has evicted one of both
    redis.call('DEL', queue, seen)
    return 0
  end
  local gone = redis.call('ZRANGEBYSCORE', seen, '-inf', exact(now))
  for _, who in ipairs(gone) do
    redis.call('ZREM', queue, who)
    redis.call('ZREM', seen, who)
    if costs then redis.call('HDEL', costs, who) end
  end
  return count - #gone
end

-- Put a caller at the end of the queue, unless it is in it, and note by when it has to ask again.
local function wait_in(queue, seen, who, place, now, us)
  if not place then
    local last = redis.call('ZREVRANGE', queue, 0, 0, 'WITHSCORES')[2] or 0
    redis.call('ZADD', queue, exact(last + 1), who)
  end
  redis.call('ZADD', seen, exact(now + us), who)
end
"""

# The limits of a key are one hash. Of each limit it has `at`, when it would be unused if nothing more were taken (GCRA's
# theoretical arrival time), and `usual`, the microseconds that a unit took when it was last taken. While a ceiling holds, it has
# that `rate`, and `till`, when the ceiling ends. Nothing passes before `closed`, and nothing matters after `last`.
_LIMITS = """
local function read(key)
  local found, flat = {}, redis.call('HGETALL', key)
  for i = 1, #flat, 2 do found[flat[i]] = tonumber(flat[i + 1]) end
  return found
end

-- Write fields and their values, which matter until some time.
local function write(key, found, changed, till, now)
  if till > (found.last or now) then
    changed[#changed + 1], changed[#changed + 2] = 'last', exact(till)
    redis.call('HMSET', key, unpack(changed))
    redis.call('PEXPIRE', key, milliseconds(till - now))
  elseif found.last then
    redis.call('HMSET', key, unpack(changed))
  end
end

-- Return when a limit would be unused, the microseconds that a unit takes now (`usual`, or more under a ceiling), and when the
-- ceiling ends, or nil.
local function find_limit(key, found, name, usual, now)
  local at, rate, till = found['at ' .. name] or now, found['rate ' .. name], found['till ' .. name]
  if not rate then return at, usual end
  local slow = math.max(usual, 1e6 / rate)
  if now < till then return at, slow, till end
  if at > till then at = till + (at - till) * usual / slow end -- what is taken stays taken, and drains faster from then on
  redis.call('HMSET', key, 'at ' .. name, exact(at))
  redis.call('HDEL', key, 'rate ' .. name, 'till ' .. name)
  return at, usual
end
"""

# KEYS: limits, queue, seen, costs. ARGV: who, grace (us); for each limit: name, rate (units a second), burst, cost.
# Answers nil if the call may go, else how long it waits (us), and how many wait before it.
RESERVE = Script(
    _LIMITS
    + """
local key, queue, seen, costs = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local who, now = ARGV[1], clock()
local ahead, place = count_waiting(now, queue, seen, costs), false
if ahead > 0 then
  place = redis.call('ZRANK', queue, who)
  ahead = place or ahead
end

-- What those ahead need of each limit counts as taken. Past the first 50, they need as much as these on average.
local before = {}
if ahead > 0 then
  local first = redis.call('ZRANGE', queue, 0, math.min(ahead, 50) - 1)
  for _, packed in ipairs(redis.call('HMGET', costs, unpack(first))) do
    for name, cost in pairs(packed and cmsgpack.unpack(packed) or {}) do
      before[name] = (before[name] or 0) + cost * ahead / #first
    end
  end
end

local found = read(key)
local closed = found.closed or now
local wait, mine, taken, last = closed - now, {}, {}, now
for i = 3, #ARGV, 4 do
  local name, usual, burst, cost = ARGV[i], 1e6 / ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local at, gap, till = find_limit(key, found, name, usual, now)
  at = math.max(at, now)
  local units = (at - now) / gap + (before[name] or 0)
  local room = burst
  if till then room = math.max(burst * usual / gap, math.min(cost, burst)) end -- what a burst takes at the usual rate
  local needed = (units + cost - room) * gap
  if till and needed > till - now then
    local left = till - now
    needed = left + math.max(0, (units - left / gap + cost - burst) * usual)
  end
  if ahead > 0 then needed = needed + math.max(0, closed - at) end
  wait = math.max(wait, needed)
  at = at + cost * gap
  last = math.max(last, at)
  taken[#taken + 1], taken[#taken + 2] = 'at ' .. name, exact(at)
  taken[#taken + 1], taken[#taken + 2] = 'usual ' .. name, exact(usual)
  mine[name] = cost
end

if wait >= 1 or ahead > 50 then -- less is a rounding error
  wait = math.max(wait, 0)
  redis.call('HSET', costs, who, cmsgpack.pack(mine)) -- what a call wants may change while it waits
  wait_in(queue, seen, who, place, now, wait + ARGV[2])
  keep(wait + ARGV[2], queue, seen, costs)
  return {exact(wait), ahead}
end
if place then
  redis.call('ZREM', queue, who)
  redis.call('ZREM', seen, who)
  redis.call('HDEL', costs, who)
end
write(key, found, taken, last, now)
return nil
"""
)

# KEYS: limits. ARGV: name, rate, and what is taken more, or given back if it is negative.
CORRECT = Script(
    _LIMITS
    + """
local key, name, usual, now = KEYS[1], ARGV[1], 1e6 / ARGV[2], clock()
local found = read(key)
local at, gap = find_limit(key, found, name, usual, now)
at = math.max(at, now) + ARGV[3] * gap
write(key, found, {'at ' .. name, exact(at), 'usual ' .. name, exact(usual)}, at, now)
"""
)

# KEYS: limits. ARGV: for how long (us) nothing passes.
CLOSE = Script(
    _LIMITS
    + """
local found, now = read(KEYS[1]), clock()
local closed = math.max(found.closed or now, now + ARGV[1])
write(KEYS[1], found, {'closed', exact(closed)}, closed, now)
"""
)

# KEYS: limits. ARGV: name, the highest rate, for how long (us).
SLOW_DOWN = Script(
    _LIMITS
    + """
local key, name, rate, now = KEYS[1], ARGV[1], tonumber(ARGV[2]), clock()
local found = read(key)
local usual, last = found['usual ' .. name], now + ARGV[3]
local changed = {'rate ' .. name, ARGV[2], 'till ' .. name, exact(last)}
if usual then -- what is taken stays taken, and drains at the new rate from now on
  local at, gap = find_limit(key, found, name, usual, now)
  if at > now then
    at = now + (at - now) * math.max(usual, 1e6 / rate) / gap
    last = math.max(last, at)
    changed[5], changed[6] = 'at ' .. name, exact(at)
  end
end
write(key, found, changed, last, now)
"""
)

# KEYS: held, queue, seen. ARGV: who, how many places there are, for how long one is held (us), grace (us), whether to wait.
# Answers nil if the call has a place, else how many wait before it.
LEASE = Script("""
local held, queue, seen = KEYS[1], KEYS[2], KEYS[3]
local who, now = ARGV[1], clock()
redis.call('ZREMRANGEBYSCORE', held, '-inf', exact(now))
if redis.call('ZSCORE', held, who) then return nil end
local ahead, place = count_waiting(now, queue, seen), false
if ahead > 0 then
  place = redis.call('ZRANK', queue, who)
  ahead = place or ahead
end
if ahead >= ARGV[2] - redis.call('ZCARD', held) then -- those ahead have the first of the free places
  if ARGV[5] == '1' then
    wait_in(queue, seen, who, place, now, tonumber(ARGV[4]))
    keep(tonumber(ARGV[4]), queue, seen)
  end
  return ahead
end
if place then
  redis.call('ZREM', queue, who)
  redis.call('ZREM', seen, who)
end
redis.call('ZADD', held, exact(now + ARGV[3]), who)
keep(tonumber(ARGV[3]), held)
return nil
""")

# KEYS: held. ARGV: who, for how long from now on (us). Answers whether the place was still held.
RENEW = Script("""
local now = clock()
local till = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]))
if not till or till <= now then return 0 end
redis.call('ZADD', KEYS[1], exact(now + ARGV[2]), ARGV[1])
keep(tonumber(ARGV[2]), KEYS[1])
return 1
""")

# KEYS: held; queue and seen of the places; queue, seen and costs of the limits. ARGV: who.
RELEASE = Script("""
for i = 1, 5 do
  redis.call('ZREM', KEYS[i], ARGV[1])
end
redis.call('HDEL', KEYS[6], ARGV[1])
""")

# KEYS: the sum, and a list of its parts: when each was added, and how much. ARGV: amount; the most, or nothing; for how long a
# part counts, and how long it gets more (both us, or nothing); for how long the sum lives without that (us).
# Answers the sum, or nil if it would exceed the most.
ADD = Script("""
local total_key, parts, now = KEYS[1], KEYS[2], clock()
local amount, most, per = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local total = tonumber(redis.call('GET', total_key)) or 0

local function part(index)
  local found = redis.call('LINDEX', parts, index)
  if not found then return nil end
  local at, size = string.match(found, '(%S+) (%S+)')
  return tonumber(at), tonumber(size)
end

local function written(at, size)
  return exact(at) .. ' ' .. exact(size)
end

local at, size = part(0)
local had_parts = at
while per and at and at <= now - per do
  redis.call('LPOP', parts)
  total = total - size
  at, size = part(0)
end
if had_parts and not at then total = 0 end -- without the rounding errors of what was added and taken away

local refused = amount >= 0 and most and total + amount > most
if amount < 0 then
  total = math.max(0, total + amount)
  local left = -amount -- it is taken off the oldest parts, which are forgotten first
  while at and left > 0 do
    redis.call('LPOP', parts)
    if size > left then redis.call('LPUSH', parts, written(at, size - left)) end
    left = left - size
    at, size = part(0)
  end
elseif not refused then
  total = total + amount
  if per and amount > 0 then
    at, size = part(-1)
    if at and now - at < tonumber(ARGV[4]) then
      redis.call('LSET', parts, -1, written(at, size + amount))
    else
      redis.call('RPUSH', parts, written(now, amount))
    end
  end
end

if total == 0 then
  redis.call('DEL', total_key, parts)
else
  local ms = milliseconds(per or ARGV[5])
  redis.call('SET', total_key, exact(total), 'PX', ms)
  redis.call('PEXPIRE', parts, ms) -- both at once, so that they agree
end
if refused then return nil end
return exact(total)
""")
