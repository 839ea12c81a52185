-- Admits, renews and settles the requests of one tenant, each call all or nothing.
--
-- KEYS  1 limits   hash    scope → its numbers, see SCOPE; `full` → µs at which all has drained
--       2 open     hash    request id → "tokens prompt completion scopes periods record"
--       3 leases   zset    request id → µs at which it counts as lost
--       4 usage    stream  the ledger
--       5 budget:  prefix of a hash for each period: scope → "used held"
--       6 charged  string  marks one request (charge only)
-- ARGV  1 admit, settle, renew, reclaim or charge   2 now in µs; empty is the clock of Redis
--
-- Requests and tokens of a minute are debts that drain by the limit. One microsecond drains a
-- limit of L a minute by L / 60e6, so a debt is kept as whole ones and parts of 1 / 60e6: all
-- numbers are whole, and below 2^53, where doubles are exact. Limits are 10^9 a minute at the most.
-- `local_limits.py` says the same with Python's whole numbers, and tests hold the two together.

local MOST = 2 ^ 53 - 1
local PARTS = 60e6
local SECOND = 1e6
local HOUR_MS = 3600 * 1000
local DAY_MS = 24 * HOUR_MS
local SPARE_MS = 60 * 1000
local AHEAD = 60 * SECOND
local BATCH = 100
local NONE = '-'

local floor, min, max = math.floor, math.min, math.max

local function text_of(number)
  return string.format('%.0f', number)
end

local function plus(a, b)
  return min(a + b, MOST)
end

-- Return the quotient and the rest of a * b / c, for a and c up to 2^32. The product itself may
-- be too large for a double: what 10^9 a minute drain in a minute is 6e16 parts. So it is divided as
-- by hand, by digits of b that keep every step below 2^53. A quotient over 2^53 is not exact, but
-- still over every number that it is compared with.
local DIGIT = 2 ^ 20

local function divided(a, b, c)
  local quotient, rest = 0, 0
  for place = 2, 0, -1 do
    local step = rest * DIGIT + a * (floor(b / DIGIT ^ place) % DIGIT)
    -- Its rounding cannot reach the next whole number: that is 1 / c away at least.
    local more = floor(step / c)
    quotient, rest = quotient * DIGIT + more, step - more * c
  end
  return quotient, rest
end

-- Return a debt of `whole` and `parts` after `elapsed` µs.
local function drained(whole, parts, rate, elapsed)
  if whole == 0 and parts == 0 then return 0, 0 end
  if rate * elapsed >= 2 * (whole + 1) * PARTS then return 0, 0 end
  local gone, gone_parts = divided(rate, elapsed, PARTS)
  whole, parts = whole - gone, parts - gone_parts
  if parts < 0 then whole, parts = whole - 1, parts + PARTS end
  if whole < 0 then return 0, 0 end
  return whole, parts
end

-- Return the µs until a debt has drained to `level`, or 0; nothing drains at a rate of 0.
local function time_to(whole, parts, level, rate)
  local over = whole - level
  if rate == 0 or over < 0 or (over == 0 and parts == 0) then return 0 end
  local micros, rest = divided(PARTS, over, rate)
  return min(MOST, micros + math.ceil((rest + parts) / rate))
end

-- A scope as it is stored: debts as of `at`, the limits that they drain by (0 before there were
-- any), tokens held and requests open.
local SCOPE = '%.0f %.0f %.0f %.0f %.0f %.0f %.0f %.0f %.0f'
local STORED = '(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)'

local function read(name, stored)
  local at, request_rate, token_rate, requests, request_parts, tokens, token_parts, held, open =
    string.match(stored or '0 0 0 0 0 0 0 0 0', STORED)
  return {
    name = name, at = tonumber(at),
    request_rate = tonumber(request_rate), token_rate = tonumber(token_rate),
    requests = tonumber(requests), request_parts = tonumber(request_parts),
    tokens = tonumber(tokens), token_parts = tonumber(token_parts),
    held = tonumber(held), open = tonumber(open),
  }
end

local function written(scope)
  return string.format(SCOPE, scope.at, scope.request_rate, scope.token_rate, scope.requests,
    scope.request_parts, scope.tokens, scope.token_parts, scope.held, scope.open)
end

-- Bring a scope's debts to `now`. They drain by the limits given, or by the last ones known. A
-- clock that was set back stops them until it has caught up: no minute is counted twice. A time
-- that lies further ahead is not believed, or a clock that was a day ahead for one request would
-- keep a tenant out for a day.
local function advance(scope, now, request_limit, token_limit)
  -- By a limit of 0 nothing would ever drain, and nothing is admitted anyway.
  if request_limit and request_limit > 0 then scope.request_rate = request_limit end
  if token_limit and token_limit > 0 then scope.token_rate = token_limit end
  scope.corrected = scope.at > now + AHEAD
  if scope.corrected then scope.at = now end
  local elapsed = max(0, now - scope.at)
  scope.ahead = max(0, scope.at - now)
  scope.requests, scope.request_parts =
    drained(scope.requests, scope.request_parts, scope.request_rate, elapsed)
  scope.tokens, scope.token_parts =
    drained(scope.tokens, scope.token_parts, scope.token_rate, elapsed)
  scope.at = max(scope.at, now)
end

-- Return the scopes with these names, and when everything of the tenant has drained.
local function load(names)
  local stored = redis.call('HMGET', KEYS[1], 'full', unpack(names))
  local scopes = {}
  for place, name in ipairs(names) do scopes[place] = read(name, stored[place + 1]) end
  return scopes, tonumber(stored[1] or 0)
end

-- Store scopes; return when everything of the tenant has drained, or little later.
local function store(scopes, full)
  if #scopes == 0 then return full end
  local values = {}
  for place, scope in ipairs(scopes) do
    for _, debt in ipairs({
      { scope.requests, scope.request_rate }, { scope.tokens, scope.token_rate },
    }) do
      if debt[2] > 0 then full = max(full, scope.at + (debt[1] + 1) * PARTS / debt[2]) end
    end
    values[2 * place - 1], values[2 * place] = scope.name, written(scope)
  end
  full = min(full, MOST)
  redis.call('HSET', KEYS[1], 'full', text_of(full), unpack(values))
  return full
end

-- Let keys expire some time after the last lease: without the counts, leases could not return
-- what they hold. While there are leases, the key asked for its expiry shares it with the others.
local function keep_open(key)
  if redis.call('PTTL', key) < DAY_MS then
    for place = 1, 3 do redis.call('PEXPIRE', KEYS[place], DAY_MS + HOUR_MS) end
  end
end

-- After requests have ended: with none open, let the counts expire when they tell nothing more.
local function keep_closed(now, full)
  if redis.call('ZCARD', KEYS[3]) == 0 then
    redis.call('PEXPIRE', KEYS[1], text_of(SPARE_MS + max(0, math.ceil((full - now) / 1000))))
  end
end

local function used_and_held(stored)
  local used, held = string.match(stored or '0 0', '^(%d+) (%d+)$')
  return tonumber(used), tonumber(held)
end

-- End a request: what it held returns, what it used is owed. Return when all has drained.
local function close(id, lease, used, now)
  local tokens, names, periods = string.match(lease, '^(%d+) %d+ %d+ (%S+) (%S+) ')
  tokens = tonumber(tokens)
  redis.call('HDEL', KEYS[2], id)
  redis.call('ZREM', KEYS[3], id)
  local wanted = {}
  if names ~= NONE then
    for name in string.gmatch(names, '[^,]+') do wanted[#wanted + 1] = name end
  end
  local scopes, full = load(wanted)
  for _, scope in ipairs(scopes) do
    advance(scope, now)
    scope.held = max(0, scope.held - tokens)
    scope.open = max(0, scope.open - 1)
    if scope.token_rate > 0 then scope.tokens = plus(scope.tokens, used) end
  end
  local place = 0
  for period in string.gmatch(periods, '[^,]+') do
    place = place + 1
    -- A budget that has expired is over: nothing is owed any more.
    local stored = period ~= NONE and redis.call('HGET', KEYS[5] .. period, wanted[place])
    if stored then
      local before, held = used_and_held(stored)
      redis.call('HSET', KEYS[5] .. period, wanted[place],
        text_of(plus(before, used)) .. ' ' .. text_of(max(0, held - tokens)))
    end
  end
  return store(scopes, full)
end

local function append(id, record)
  redis.call('XADD', KEYS[4], '*', 'id', id, 'r', record)
end

-- Return the ledger's record of a request whose gateway replica is gone.
local function lost(record, completion)
  local readable, values = pcall(cjson.decode, record)
  if not readable or type(values) ~= 'table' then return record end
  values.status = 'lost'
  values.completion_tokens = completion
  return cjson.encode(values)
end

-- End some of the requests whose leases have ended; return how many.
local function sweep(now)
  local ended = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', text_of(now), 'LIMIT', 0, BATCH)
  if #ended == 0 then return 0 end
  local _, full = load({})
  for _, id in ipairs(ended) do
    local lease = redis.call('HGET', KEYS[2], id)
    if lease then
      local prompt, completion, record = string.match(lease, '^%d+ (%d+) (%d+) %S+ %S+ (.*)$')
      prompt, completion = tonumber(prompt), tonumber(completion)
      append(id, lost(record, completion))
      full = close(id, lease, plus(prompt, completion), now)
    else
      redis.call('ZREM', KEYS[3], id)
    end
  end
  keep_closed(now, full)
  return #ended
end

-- ARGV 3 lease in µs. As `sweep`, after leases that end later than one could that was taken now,
-- since the clock was set back, were made to end as that would.
local function reclaim(now)
  local latest = now + tonumber(ARGV[3])
  local late = redis.call('ZRANGEBYSCORE', KEYS[3], text_of(latest + AHEAD), '+inf',
    'LIMIT', 0, BATCH)
  for _, id in ipairs(late) do redis.call('ZADD', KEYS[3], text_of(latest), id) end
  return sweep(now)
end

-- Return the name of the day or month in UTC that `now`, from 2024 on, lies in, and its end in µs.
local function period_of(kind, now)
  local days = floor(now / (86400 * SECOND))
  local ends = days + 1
  local year, month, length = 2024, 1, nil
  days = days - 19723
  while true do
    local leap = (year % 4 == 0 and year % 100 ~= 0) or year % 400 == 0
    length = leap and 366 or 365
    if days < length then break end
    days, year = days - length, year + 1
  end
  local lengths = { 31, length - 337, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31 }
  while days >= lengths[month] do days, month = days - lengths[month], month + 1 end
  if kind == 'day' then
    return string.format('%04d-%02d-%02d', year, month, days + 1), ends * 86400 * SECOND
  end
  ends = ends + lengths[month] - days - 1
  return string.format('%04d-%02d', year, month), ends * 86400 * SECOND
end

-- Return the limits in ARGV from `first` on, one scope each, and their names.
local function limits_from(first, now)
  local all, names, periods = {}, {}, {}
  for place = first, #ARGV do
    local name, requests, tokens, concurrent, budget, kind =
      string.match(ARGV[place], '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+)$')
    local limits = {
      requests = tonumber(requests), tokens = tonumber(tokens),
      concurrent = tonumber(concurrent), budget = tonumber(budget),
    }
    if limits.budget then
      if not periods[kind] then periods[kind] = { period_of(kind, now) } end
      limits.period, limits.ends = unpack(periods[kind])
    end
    all[#all + 1], names[#names + 1] = limits, name
  end
  return all, names
end

local function store_budget(limits, name, used, held, now)
  local key = KEYS[5] .. limits.period
  redis.call('HSET', key, name, text_of(used) .. ' ' .. text_of(held))
  if redis.call('PTTL', key) < 0 then
    redis.call('PEXPIRE', key, text_of(math.ceil((limits.ends - now) / 1000) + DAY_MS))
  end
end

-- Return a wait from now on, of a debt that drains only once a clock set back has caught up.
local function from_now(scope, wait)
  return min(MOST, scope.ahead + wait)
end

-- Each returns nil if the limit lets the request pass; or else the wait in µs, false for never.

local function request_wait(scope, limits)
  local limit = limits.requests
  if not limit then return nil end
  if limit == 0 then return false end
  local wait = time_to(scope.requests, scope.request_parts, limit - 1, limit)
  if wait > 0 then return from_now(scope, wait) end
end

local function token_wait(scope, limits, tokens)
  local limit = limits.tokens
  if not limit then return nil end
  if limit == 0 or tokens > limit then return false end
  local level = limit - tokens
  if scope.held <= level then
    local wait = time_to(scope.tokens, scope.token_parts, level - scope.held, limit)
    if wait > 0 then return from_now(scope, wait) end
    return nil
  end
  -- Others hold too much; when they end, what they have used is owed.
  return max(SECOND, from_now(scope, time_to(scope.tokens, scope.token_parts, level, limit)))
end

local function concurrency_wait(scope, limits)
  if not limits.concurrent or scope.open < limits.concurrent then return nil end
  return limits.concurrent > 0 and SECOND
end

local function budget_wait(limits, tokens)
  local budget = limits.budget
  if not budget then return nil end
  local rest = budget - limits.used - tokens
  if budget == 0 or rest < 0 then return false end
  if limits.held > rest then return SECOND end
end

-- Return the limit, what remains and the µs until all of it does, of the scope of which the
-- least part remains. `owed` names a debt, and `held` what is held beside it.
local function figures(all, scopes, owed, parts, held)
  local least, limit, remaining, reset = nil, false, false, false
  for place, limits in ipairs(all) do
    local most, scope = limits[owed], scopes[place]
    if most then
      local holds = held and scope[held] or 0
      local left = max(0, most - scope[owed] - holds - (scope[parts] > 0 and 1 or 0))
      local ratio = most > 0 and left / most or 0
      if not least or ratio < least then
        least, limit, remaining, reset = ratio, most, left, 0
        if most > 0 then
          local wait = time_to(plus(scope[owed], holds), scope[parts], 0, most)
          reset = from_now(scope, wait)
        end
      end
    end
  end
  return limit, remaining, reset
end

-- After the ten figures: period, tokens used and held of each scope with a budget.
local function answer(all, scopes, kind, name, limit, wait)
  local requests, requests_left, requests_reset =
    figures(all, scopes, 'requests', 'request_parts')
  local tokens, tokens_left, tokens_reset =
    figures(all, scopes, 'tokens', 'token_parts', 'held')
  local told = {
    requests, requests_left, requests_reset, tokens, tokens_left, tokens_reset,
    kind, name, limit, wait,
  }
  local place = #told
  for _, limits in ipairs(all) do
    if limits.budget then
      told[place + 1], told[place + 2], told[place + 3] = limits.period, limits.used, limits.held
      place = place + 3
    end
  end
  return told
end

-- ARGV 3 request id, 4 tokens, 5 lease in µs, 6 record, 7… one scope each.
local function admit(now)
  local id, tokens, lease, record = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
  sweep(now)
  local all, names = limits_from(7, now)
  local scopes, full = load(names)
  local kind, name, limit, longest = false, false, false, nil
  local function weigh(wait, kind_here, name_here, limit_here)
    if wait == nil or longest == false then return end
    if longest == nil or wait == false or wait > longest then
      kind, name, limit, longest = kind_here, name_here, limit_here, wait
    end
  end
  for place, limits in ipairs(all) do
    local scope = scopes[place]
    advance(scope, now, limits.requests, limits.tokens)
    if limits.budget then
      local stored = redis.call('HGET', KEYS[5] .. limits.period, scope.name)
      limits.used, limits.held = used_and_held(stored)
    end
    weigh(request_wait(scope, limits), 'requests', scope.name, limits.requests)
    weigh(token_wait(scope, limits, tokens), 'tokens', scope.name, limits.tokens)
    weigh(concurrency_wait(scope, limits), 'concurrency', scope.name, limits.concurrent)
    weigh(budget_wait(limits, tokens), 'budget', scope.name, limits.budget)
  end
  if kind and redis.call('HEXISTS', KEYS[2], id) == 0 then
    -- Kept, or nothing would ever drain while every request is refused.
    for _, scope in ipairs(scopes) do
      if scope.corrected then store(scopes, full) break end
    end
    return answer(all, scopes, kind, name, limit, longest)
  end
  local entry = { text_of(tokens), '0', '0', NONE, NONE, record }
  if #names > 0 then
    local periods = {}
    for place, limits in ipairs(all) do periods[place] = limits.period or NONE end
    entry[4], entry[5] = table.concat(names, ','), table.concat(periods, ',')
  end
  -- Not set if it was sent again because the answer was lost: then it has what it needs.
  if redis.call('HSETNX', KEYS[2], id, table.concat(entry, ' ')) == 1 then
    for place, limits in ipairs(all) do
      local scope = scopes[place]
      if limits.requests then scope.requests = plus(scope.requests, 1) end
      scope.held = plus(scope.held, tokens)
      scope.open = scope.open + 1
      if limits.budget then
        limits.held = plus(limits.held, tokens)
        store_budget(limits, scope.name, limits.used, limits.held, now)
      end
    end
    store(scopes, full)
    redis.call('ZADD', KEYS[3], text_of(now + lease), id)
    keep_open(#names > 0 and KEYS[1] or KEYS[3])
  end
  return answer(all, scopes, false, false, false, false)
end

-- ARGV 3 request id, 4 tokens used, 5 record. Returns 1 if the request was open.
local function settle(now)
  append(ARGV[3], ARGV[5])
  local lease = redis.call('HGET', KEYS[2], ARGV[3])
  if not lease then return 0 end
  keep_closed(now, close(ARGV[3], lease, tonumber(ARGV[4]), now))
  return 1
end

-- ARGV 3 lease in µs, 4… request id, prompt tokens and completion tokens so far, of each. Returns
-- the ids that are not open.
local function renew(now)
  local unknown, ends = {}, text_of(now + tonumber(ARGV[3]))
  for place = 4, #ARGV, 3 do
    local id = ARGV[place]
    local lease = redis.call('HGET', KEYS[2], id)
    if lease then
      local tokens, rest = string.match(lease, '^(%d+) %d+ %d+ (.*)$')
      local entry = { tokens, ARGV[place + 1], ARGV[place + 2], rest }
      redis.call('HSET', KEYS[2], id, table.concat(entry, ' '))
      redis.call('ZADD', KEYS[3], ends, id)
    else
      unknown[#unknown + 1] = id
    end
  end
  keep_open(KEYS[3])
  keep_open(KEYS[1])
  return unknown
end

-- ARGV 3 request id, 4 tokens used, 5 record, 6… one scope each. Returns 1 if it counted.
local function charge(now)
  local id, used = ARGV[3], tonumber(ARGV[4])
  append(id, ARGV[5])
  if not redis.call('SET', KEYS[6], 1, 'NX', 'PX', DAY_MS) then return 0 end
  local lease = redis.call('HGET', KEYS[2], id)
  if lease then
    -- It was admitted here as well, but the answer came too late to be heard.
    keep_closed(now, close(id, lease, used, now))
    return 1
  end
  local all, names = limits_from(6, now)
  local scopes, full = load(names)
  -- What was used a minute ago and longer has drained by now: a bucket is filled at the most.
  local function filled(whole, parts, more, limit)
    if more <= limit - whole - (parts > 0 and 1 or 0) then return whole + more, parts end
    if whole < limit then return limit, 0 end
    return whole, parts
  end
  for place, limits in ipairs(all) do
    local scope = scopes[place]
    advance(scope, now, limits.requests, limits.tokens)
    if limits.requests then
      scope.requests, scope.request_parts =
        filled(scope.requests, scope.request_parts, 1, limits.requests)
    end
    if limits.tokens then
      scope.tokens, scope.token_parts =
        filled(scope.tokens, scope.token_parts, used, limits.tokens)
    end
    if limits.budget then
      local stored = redis.call('HGET', KEYS[5] .. limits.period, scope.name)
      local before, held = used_and_held(stored)
      store_budget(limits, scope.name, plus(before, used), held, now)
    end
  end
  full = store(scopes, full)
  keep_open(KEYS[1])
  keep_closed(now, full)
  return 1
end

local now = tonumber(ARGV[2])
if not now then
  local time = redis.call('TIME')
  now = time[1] * SECOND + time[2]
end
local operations = {
  admit = admit, settle = settle, renew = renew, reclaim = reclaim, charge = charge,
}
return operations[ARGV[1]](now)
