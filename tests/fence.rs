//! The fence, tried exhaustively: two servers, one key, every interleaving of starts,
//! claims, captures, commits, ends, crashes, takeovers, retention, late creates and lost
//! answers up to a bound, over the very functions that decide in the server.
//!
//! What is promised is checked in every state: P1 (one live claim at most), P2 (what was
//! acknowledged is in every later tree), and that a captured tree is never dropped. The
//! protocol with one of its parts taken out must fail.

use std::collections::{HashSet, VecDeque};

use boilerhouse::{
    model::Epoch,
    state::fence::{
        self, Admission, Closing, Link, Local, Mode, Standing,
        owner::{self, OwnerRecord, OwnerState, Verdict},
    },
};

const NAMES: [&str; 2] = ["a", "b"];

/// A part of the protocol that is left out, to see that it is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// A create that was answered is believed, whatever the newest record is.
    ReadBack,
    /// A record of the claim's own epoch is taken for the attempt's own.
    Nonce,
    /// Retention removes record 1 like any other.
    RecordOne,
    /// A claim begins without a record of its own.
    Open,
    /// The writer's server is not looked at.
    Server,
    /// What an operator decided goes on top of whatever is the newest by then.
    Decision,
}

/// How much happens at most.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    mode: Mode,
    without: Without,
    attempts: u8,
    crashes: u8,
    losses: u8,
    removals: u8,
    lies: u8,
    takeovers: u8,
    decisions: u8,
    is_truthful: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Record {
    number: u8,
    epoch: u8,
    nonce: u8,
    server: u8,
    term: u8,
    holder: Option<(u8, u8)>,
    tree: Option<u8>,
}

/// Where a server's claim of the key stands. All of it is journaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Claim {
    None,
    /// `open` is to be written as this attempt; the tree it begins with.
    Opening {
        epoch: u8,
        nonce: u8,
        tree: Option<u8>,
        on_top_of: u8,
    },
    /// The tenant's program runs.
    Active {
        epoch: u8,
        tree: Option<u8>,
    },
    /// Its tree is on this node only.
    Dirty {
        epoch: u8,
        nonce: u8,
    },
    /// Nothing is to be saved, and its end is to be written.
    Closing {
        epoch: u8,
        nonce: u8,
    },
    /// The tree is kept for an operator.
    Conflict {
        nonce: u8,
    },
    /// An operator decided for the tree: it comes right after this record or not at all.
    Decided {
        epoch: u8,
        nonce: u8,
        on_top_of: u8,
    },
}

/// A create that a server waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Call {
    Idle,
    /// Sent, no answer yet.
    Waiting(Record),
    /// Answered: made.
    Created(Record),
    /// The answer is lost, or there was a record.
    Unsure(Record),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Server {
    is_up: bool,
    /// The term it believes in; not known after a crash.
    term: Option<u8>,
    known: u8,
    cached: Option<u8>,
    opened: Option<u8>,
    claim: Claim,
    call: Call,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    servers: [Server; 2],
    chain: Vec<Record>,
    owners: Vec<(u8, OwnerState)>,
    /// Creates on their way whose answer nobody waits for.
    late: Vec<Record>,
    most: u8,
    nonces: u8,
    crashes: u8,
    losses: u8,
    removals: u8,
    lies: u8,
    takeovers: u8,
    decisions: u8,
    /// Trees that an operator decided against: where servers set them aside.
    aside: u32,
    /// By attempt: the trees that a captured tree builds on, itself included.
    ancestors: Vec<u32>,
    acknowledged: u32,
    broken: Option<&'static str>,
}

impl State {
    fn new() -> Self {
        let server = Server {
            is_up: false,
            term: None,
            known: 0,
            cached: None,
            opened: None,
            claim: Claim::None,
            call: Call::Idle,
        };
        Self {
            servers: [server.clone(), server],
            chain: Vec::new(),
            owners: Vec::new(),
            late: Vec::new(),
            most: 0,
            nonces: 0,
            crashes: 0,
            losses: 0,
            removals: 0,
            lies: 0,
            takeovers: 0,
            decisions: 0,
            aside: 0,
            ancestors: Vec::new(),
            acknowledged: 0,
            broken: None,
        }
    }

    fn newest(&self) -> Option<Record> {
        self.chain.iter().copied().max_by_key(|record| record.number)
    }

    /// What a server reads as the newest record; a listing may come back empty by mistake.
    fn read(&self, is_lie: bool) -> Result<Option<Record>, ()> {
        if !is_lie {
            return Ok(self.newest());
        }
        if self.chain.iter().any(|record| record.number == 1) { Err(()) } else { Ok(None) }
    }

    fn attempt(&mut self) -> u8 {
        self.nonces += 1;
        self.ancestors.push(0);
        self.nonces - 1
    }

    fn of(&self, tree: Option<u8>) -> u32 {
        tree.map_or(0, |tree| self.ancestors[usize::from(tree)])
    }

    /// A create arrives at the store; answers whether it made the record.
    fn deliver(&mut self, record: Record) -> bool {
        if self.chain.iter().any(|there| there.number == record.number) {
            return false;
        }
        if let Some(newest) = self.newest().filter(|newest| newest.number < record.number) {
            let is_stale = record.epoch < newest.epoch
                || (record.epoch == newest.epoch && record.server != newest.server);
            if is_stale {
                self.broken = Some("a stale epoch published");
            }
        }
        let is_newest = self.newest().is_none_or(|newest| newest.number < record.number);
        if is_newest && record.number != self.most + 1 {
            self.broken = Some("record numbers began again");
        }
        self.most = self.most.max(record.number);
        self.chain.push(record);
        self.chain.sort_by_key(|record| record.number);
        true
    }

    fn owner_records(&self, mode: Mode) -> Vec<OwnerRecord> {
        let record = |(at, (server, state)): (usize, &(u8, OwnerState))| OwnerRecord {
            version: owner::OWNER_VERSION,
            number: at as u64 + 1,
            server: NAMES[usize::from(*server)].to_owned(),
            nonce: at.to_string(),
            mode,
            state: *state,
            created_ms: 0,
            by_operator: false,
        };
        self.owners.iter().enumerate().map(record).collect()
    }

    fn check(&self, bounds: &Bounds) -> Result<(), &'static str> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let live = self.servers.iter().filter(|server| matches!(server.claim, Claim::Active { .. })).count();
        if live > 1 && (bounds.mode == Mode::Shared || bounds.is_truthful) {
            return Err("two claims live");
        }
        if let Some(newest) = self.newest()
            && self.acknowledged & !self.of(newest.tree) != 0
        {
            return Err("an acknowledged tree is not in the newest one");
        }
        let mut kept =
            self.aside | self.acknowledged | self.newest().map_or(0, |newest| self.of(newest.tree));
        for server in &self.servers {
            kept |= self.of(server.cached);
            kept |= match server.claim {
                Claim::None | Claim::Closing { .. } => 0,
                Claim::Opening { tree, .. } | Claim::Active { tree, .. } => self.of(tree),
                Claim::Dirty { nonce, .. } | Claim::Conflict { nonce } | Claim::Decided { nonce, .. } => {
                    self.of(Some(nonce))
                }
            };
        }
        let captured = self.ancestors.iter().fold(0, |all, of| all | of);
        if captured & !kept != 0 { Err("a captured tree is gone") } else { Ok(()) }
    }
}

fn link(record: &Record) -> Link {
    Link {
        epoch: Epoch(u64::from(record.epoch)),
        nonce: record.nonce.to_string(),
        server: Some(NAMES[usize::from(record.server)].to_owned()),
        term: Some(u64::from(record.term)),
        holder: record
            .holder
            .map(|(server, epoch)| (NAMES[usize::from(server)].to_owned(), Epoch(u64::from(epoch)))),
        tree: record.tree.map(|tree| tree.to_string()),
    }
}

fn standing(bounds: &Bounds, newest: Option<&Record>, at: u8, epoch: u8, nonce: u8) -> Standing {
    let mut newest = newest.map(link);
    if let Some(newest) = newest.as_mut() {
        if bounds.without == Without::Server {
            newest.server = None;
        }
        if bounds.without == Without::Nonce && newest.epoch.0 == u64::from(epoch) {
            newest.nonce = nonce.to_string();
        }
    }
    fence::standing(newest.as_ref(), NAMES[usize::from(at)], Epoch(u64::from(epoch)), &nonce.to_string())
}

/// Every state that one step leads to.
fn steps(state: &State, bounds: &Bounds) -> Vec<(String, State)> {
    let mut next = Vec::new();
    for at in 0..2_u8 {
        if state.servers[usize::from(at)].is_up {
            up(state, bounds, at, &mut next);
        } else {
            start(state, bounds, at, &mut next);
        }
    }
    for index in 0..state.late.len() {
        let mut after = state.clone();
        let record = after.late.remove(index);
        after.deliver(record);
        next.push((format!("late create {} lands", record.number), after));
    }
    if state.removals < bounds.removals {
        let newest = state.newest().map_or(0, |newest| newest.number);
        for record in &state.chain {
            if record.number != newest && (record.number != 1 || bounds.without == Without::RecordOne) {
                let mut after = state.clone();
                after.removals += 1;
                after.chain.retain(|there| there.number != record.number);
                next.push((format!("retention removes {}", record.number), after));
            }
        }
    }
    if state.takeovers < bounds.takeovers {
        for from in 0..2_u8 {
            let other = &state.servers[usize::from(from)];
            let is_dead = !other.is_up && !matches!(other.claim, Claim::Active { .. });
            let holds = match owner::tenure(&state.owner_records(bounds.mode)) {
                owner::Tenure::Free => false,
                owner::Tenure::Exclusive(owner) => owner.server == NAMES[usize::from(from)],
                owner::Tenure::Shared(all) => all.contains_key(NAMES[usize::from(from)]),
            };
            if holds && (is_dead || !bounds.is_truthful) {
                let mut after = state.clone();
                after.takeovers += 1;
                after.owners.push((from, OwnerState::Released));
                next.push((format!("an operator takes the store from {}", NAMES[usize::from(from)]), after));
            }
        }
    }
    next
}

fn start(state: &State, bounds: &Bounds, at: u8, next: &mut Vec<(String, State)>) {
    let (me, name) = (usize::from(at), NAMES[usize::from(at)]);
    let records = state.owner_records(bounds.mode);
    if owner::verdict(&owner::tenure(&records), name, bounds.mode, "new") != Verdict::Take {
        return;
    }
    let mut after = state.clone();
    after.owners.push((at, OwnerState::Held));
    let server = &mut after.servers[me];
    server.is_up = true;
    server.term = Some(after.owners.len() as u8);
    // A claim that did not come up goes to its end; its `open` may be under way.
    if let Claim::Opening { epoch, nonce, .. } = server.claim {
        server.claim = Claim::Closing { epoch, nonce };
    }
    next.push((format!("{name} starts"), after));
}

fn up(state: &State, bounds: &Bounds, at: u8, next: &mut Vec<(String, State)>) {
    let (me, name) = (usize::from(at), NAMES[usize::from(at)]);
    let server = &state.servers[me];
    if state.crashes < bounds.crashes {
        let mut after = state.clone();
        after.crashes += 1;
        let server = &mut after.servers[me];
        server.is_up = false;
        server.term = None;
        if let Call::Waiting(record) = std::mem::replace(&mut server.call, Call::Idle) {
            after.late.push(record);
        }
        next.push((format!("{name} crashes"), after));
    }
    match server.call {
        Call::Idle => idle(state, bounds, at, next),
        Call::Waiting(record) => {
            let mut after = state.clone();
            let is_made = after.deliver(record);
            after.servers[me].call = if is_made { Call::Created(record) } else { Call::Unsure(record) };
            next.push((format!("{name}'s create {} is answered", record.number), after));
            if state.losses < bounds.losses {
                let mut after = state.clone();
                after.losses += 1;
                after.deliver(record);
                after.servers[me].call = Call::Unsure(record);
                next.push((format!("the answer to {name}'s create {} is lost", record.number), after));
                let mut after = state.clone();
                after.losses += 1;
                after.late.push(record);
                after.servers[me].call = Call::Unsure(record);
                next.push((format!("{name}'s create {} is late", record.number), after));
            }
        }
        Call::Created(record) | Call::Unsure(record) => {
            let is_created = matches!(server.call, Call::Created(_));
            let mut after = state.clone();
            after.servers[me].call = Call::Idle;
            let newest = state.newest();
            let is_newest = newest.is_some_and(|newest| match bounds.without {
                Without::Nonce => newest.epoch == record.epoch,
                _ => newest.nonce == record.nonce,
            });
            let is_there = state.chain.iter().any(|there| there.nonce == record.nonce);
            let is_save = matches!(server.claim, Claim::Dirty { .. } | Claim::Decided { .. });
            let is_done = match bounds.without {
                Without::ReadBack => is_created || is_there,
                _ => is_newest || (is_save && is_built_on(state, record.nonce)),
            };
            if is_done {
                done(&mut after, at, record);
            } else {
                refused(&mut after, bounds, at, newest);
            }
            next.push((format!("{name} reads back {}", record.number), after));
        }
    }
}

/// What follows when the record is known to be the newest.
fn done(state: &mut State, at: u8, record: Record) {
    let server = &mut state.servers[usize::from(at)];
    match server.claim {
        Claim::Opening { epoch, tree, .. } => {
            server.opened = server.term;
            server.cached = None;
            server.claim = Claim::Active { epoch, tree };
        }
        Claim::Dirty { nonce, .. } | Claim::Decided { nonce, .. } => saved(state, at, nonce),
        Claim::Closing { .. } => server.claim = Claim::None,
        Claim::None | Claim::Active { .. } | Claim::Conflict { .. } => {
            unreachable!("{record:?} belongs to {:?}", server.claim)
        }
    }
}

fn saved(state: &mut State, at: u8, nonce: u8) {
    let server = &mut state.servers[usize::from(at)];
    server.cached = Some(nonce);
    server.claim = Claim::None;
    state.acknowledged |= 1 << nonce;
}

/// Returns whether a record is there that was written on top of a save.
fn is_built_on(state: &State, nonce: u8) -> bool {
    state.chain.iter().any(|there| fence::builds_on(&link(there), &nonce.to_string()))
}

/// What follows when it is not: a claim that did not come up ends, a save is tried again
/// unless it is fenced.
fn refused(state: &mut State, bounds: &Bounds, at: u8, newest: Option<Record>) {
    let claim = state.servers[usize::from(at)].claim;
    state.servers[usize::from(at)].claim = match claim {
        Claim::Opening { epoch, nonce, .. } => Claim::Closing { epoch, nonce },
        Claim::Dirty { epoch, nonce } => match standing(bounds, newest.as_ref(), at, epoch, nonce) {
            Standing::Fenced(_) => Claim::Conflict { nonce },
            Standing::Open | Standing::Committed => claim,
        },
        Claim::Decided { nonce, on_top_of, .. } => match decided(bounds, newest.as_ref(), on_top_of, nonce) {
            Standing::Fenced(_) => Claim::Conflict { nonce },
            Standing::Open | Standing::Committed => claim,
        },
        other => other,
    };
}

fn decided(bounds: &Bounds, newest: Option<&Record>, on_top_of: u8, nonce: u8) -> Standing {
    let newest = newest.map(|newest| (u64::from(newest.number), link(newest)));
    let at = match (bounds.without, &newest) {
        (Without::Decision, Some((number, _))) => *number,
        _ => u64::from(on_top_of),
    };
    fence::standing_after(newest.as_ref().map(|(number, link)| (*number, link)), at, &nonce.to_string())
}

/// An operator decides about a tree in conflict, with the newest record in view.
fn decide(state: &State, bounds: &Bounds, at: u8, lost: u8, next: &mut Vec<(String, State)>) {
    let (me, name) = (usize::from(at), NAMES[usize::from(at)]);
    let Some(newest) = state.newest().filter(|_| state.decisions < bounds.decisions) else { return };
    let mut after = state.clone();
    after.decisions += 1;
    after.aside |= after.of(Some(lost));
    let server = &mut after.servers[me];
    server.known = server.known.max(newest.epoch);
    (server.cached, server.opened, server.claim) = (None, None, Claim::None);
    next.push((format!("an operator decides for theirs on {name}"), after));

    let records = state.owner_records(bounds.mode);
    let lives = |(holder, _): (u8, u8)| {
        let term = Some(u64::from(newest.term));
        holder != at && !owner::is_void(&records, NAMES[usize::from(holder)], term)
    };
    if bounds.mode == Mode::Shared && newest.holder.is_some_and(lives) {
        return;
    }
    let mut after = state.clone();
    after.decisions += 1;
    let nonce = after.attempt();
    // What it replaces stays in the history: that is what was decided.
    after.ancestors[usize::from(nonce)] = after.of(Some(lost)) | after.of(newest.tree) | (1 << nonce);
    let server = &mut after.servers[me];
    let epoch = server.known.max(newest.epoch) + 1;
    (server.known, server.opened) = (epoch, None);
    server.claim = Claim::Decided { epoch, nonce, on_top_of: newest.number };
    next.push((format!("an operator decides for ours on {name}, after {}", newest.number), after));
}

fn idle(state: &State, bounds: &Bounds, at: u8, next: &mut Vec<(String, State)>) {
    let (me, name) = (usize::from(at), NAMES[usize::from(at)]);
    let server = &state.servers[me];
    match server.claim {
        Claim::None if state.nonces < bounds.attempts => claim(state, bounds, at, next),
        Claim::None => {}
        Claim::Conflict { nonce } => decide(state, bounds, at, nonce, next),
        Claim::Decided { epoch, nonce, on_top_of } => {
            let newest = state.newest();
            let mut after = state.clone();
            match decided(bounds, newest.as_ref(), on_top_of, nonce) {
                Standing::Fenced(_) if is_built_on(state, nonce) => {
                    saved(&mut after, at, nonce);
                    next.push((format!("{name} finds decided {nonce} built on"), after));
                }
                Standing::Fenced(_) => {
                    after.servers[me].claim = Claim::Conflict { nonce };
                    next.push((format!("{name}'s decided tree is fenced"), after));
                }
                Standing::Committed => {
                    saved(&mut after, at, nonce);
                    next.push((format!("{name} finds {nonce} committed"), after));
                }
                Standing::Open => {
                    let record = Record {
                        number: newest.map_or(1, |newest| newest.number + 1),
                        epoch,
                        nonce,
                        server: at,
                        term: server.term.unwrap_or(0),
                        holder: None,
                        tree: Some(nonce),
                    };
                    after.servers[me].call = Call::Waiting(record);
                    next.push((format!("{name} sends decided {}", record.number), after));
                }
            }
        }
        Claim::Opening { epoch, nonce, on_top_of, .. } => {
            let newest = state.newest();
            let mut after = state.clone();
            // On top of the very record with which it was decided, or not at all.
            if newest.map_or(0, |newest| newest.number) == on_top_of {
                let record = Record {
                    number: on_top_of + 1,
                    epoch,
                    nonce,
                    server: at,
                    term: server.term.unwrap_or(0),
                    holder: Some((at, epoch)),
                    tree: newest.and_then(|newest| newest.tree),
                };
                after.servers[me].call = Call::Waiting(record);
                next.push((format!("{name} sends open {}", record.number), after));
            } else {
                after.servers[me].claim = Claim::Closing { epoch, nonce };
                next.push((format!("{name} gives the claim up"), after));
            }
        }
        Claim::Active { epoch, tree } => {
            if state.nonces < bounds.attempts {
                let mut after = state.clone();
                let nonce = after.attempt();
                after.ancestors[usize::from(nonce)] = after.of(tree) | (1 << nonce);
                after.servers[me].claim = Claim::Dirty { epoch, nonce };
                next.push((format!("{name} captures {nonce}"), after));
            }
        }
        Claim::Dirty { epoch, nonce } => {
            let newest = state.newest();
            let mut after = state.clone();
            match standing(bounds, newest.as_ref(), at, epoch, nonce) {
                Standing::Fenced(_) if is_built_on(state, nonce) => {
                    saved(&mut after, at, nonce);
                    next.push((format!("{name} finds {nonce} built on"), after));
                }
                Standing::Fenced(_) => {
                    after.servers[me].claim = Claim::Conflict { nonce };
                    next.push((format!("{name} is fenced"), after));
                }
                Standing::Committed => {
                    saved(&mut after, at, nonce);
                    next.push((format!("{name} finds {nonce} committed"), after));
                }
                Standing::Open => {
                    let record = Record {
                        number: newest.map_or(1, |newest| newest.number + 1),
                        epoch,
                        nonce,
                        server: at,
                        term: server.term.unwrap_or(0),
                        holder: None,
                        tree: Some(nonce),
                    };
                    after.servers[me].call = Call::Waiting(record);
                    next.push((format!("{name} sends commit {}", record.number), after));
                }
            }
        }
        Claim::Closing { epoch, nonce } => {
            let newest = state.newest();
            let decided = fence::close(newest.as_ref().map(link).as_ref(), name, Epoch(u64::from(epoch)));
            let mut after = state.clone();
            match decided {
                Closing::Done => {
                    after.servers[me].claim = Claim::None;
                    next.push((format!("{name} has nothing to close"), after));
                }
                Closing::Append => {
                    let record = Record {
                        number: newest.map_or(1, |newest| newest.number + 1),
                        epoch,
                        nonce,
                        server: at,
                        term: server.term.unwrap_or(0),
                        holder: None,
                        tree: newest.and_then(|newest| newest.tree),
                    };
                    after.servers[me].call = Call::Waiting(record);
                    next.push((format!("{name} sends close {}", record.number), after));
                }
            }
        }
    }
}

fn claim(state: &State, bounds: &Bounds, at: u8, next: &mut Vec<(String, State)>) {
    let (me, name) = (usize::from(at), NAMES[usize::from(at)]);
    let server = &state.servers[me];
    let is_open = bounds.mode == Mode::Exclusive && server.opened == server.term;
    if (is_open || bounds.without == Without::Open) && server.opened.is_some() {
        let mut after = state.clone();
        let server = &mut after.servers[me];
        server.known += 1;
        server.claim = Claim::Active { epoch: server.known, tree: server.cached };
        next.push((format!("{name} claims from its cache"), after));
        return;
    }
    for is_lie in [false, true] {
        if is_lie && state.lies >= bounds.lies {
            continue;
        }
        let Ok(newest) = state.read(is_lie) else { continue };
        let local = server.cached.map_or(Local::Nothing, |saved| Local::Saved(saved.to_string()));
        let records = state.owner_records(bounds.mode);
        let is_void =
            newest.and_then(|newest| Some((newest, newest.holder?.0))).is_some_and(|(newest, holder)| {
                owner::is_void(&records, NAMES[usize::from(holder)], Some(u64::from(newest.term)))
            });
        let link = newest.as_ref().map(link);
        let known = Epoch(u64::from(server.known));
        let admitted = fence::admit(link.as_ref(), name, bounds.mode, known, &local, is_void);
        let Admission::Admitted { epoch, from_here } = admitted else { continue };
        let mut after = state.clone();
        after.lies += u8::from(is_lie);
        if newest.is_none() && !state.chain.is_empty() {
            after.broken = Some("absence was believed and not proven");
        }
        let nonce = after.attempt();
        let tree = if from_here { server.cached } else { newest.and_then(|newest| newest.tree) };
        let server = &mut after.servers[me];
        server.known = epoch.0 as u8;
        let on_top_of = newest.map_or(0, |newest| newest.number);
        server.claim = Claim::Opening { epoch: server.known, nonce, tree, on_top_of };
        if bounds.without == Without::Open {
            server.opened = server.term;
            server.claim = Claim::Active { epoch: server.known, tree };
        }
        next.push((
            format!("{name} begins claim {}{}", epoch.0, if is_lie { " on a lie" } else { "" }),
            after,
        ));
    }
}

/// Visits every state within the bounds; answers how many there are, or the way to one in
/// which a promise is broken.
fn explore(bounds: &Bounds) -> Result<usize, (String, Vec<String>)> {
    let mut states: Vec<(State, usize, String)> = vec![(State::new(), 0, String::new())];
    let mut seen: HashSet<State> = HashSet::from([State::new()]);
    let mut waiting = VecDeque::from([0]);
    while let Some(index) = waiting.pop_front() {
        let state = states[index].0.clone();
        for (what, after) in steps(&state, bounds) {
            if !seen.insert(after.clone()) {
                continue;
            }
            let broken = after.check(bounds);
            states.push((after, index, what));
            if let Err(broken) = broken {
                let mut way = Vec::new();
                let mut at = states.len() - 1;
                while at != 0 {
                    way.push(states[at].2.clone());
                    at = states[at].1;
                }
                way.reverse();
                return Err((broken.to_owned(), way));
            }
            waiting.push_back(states.len() - 1);
        }
    }
    Ok(states.len())
}

/// The most that happens in one run; `FENCE_MODEL=full` is more, and takes minutes.
fn bounds(mode: Mode, is_truthful: bool) -> Bounds {
    let is_full = match std::env::var("FENCE_MODEL") {
        Ok(size) => {
            assert_eq!(size, "full", "FENCE_MODEL is \"full\" or not set");
            true
        }
        Err(_) => false,
    };
    Bounds {
        mode,
        without: Without::Nothing,
        attempts: if is_full { 4 } else { 3 },
        crashes: 1,
        losses: 1,
        removals: 1,
        lies: 1,
        takeovers: 1,
        decisions: 0,
        is_truthful,
    }
}

#[test]
fn p1_and_p2_hold_across_two_servers_in_every_interleaving() {
    // Long enough for both servers to save, where little else happens.
    let far = Bounds { attempts: 4, crashes: 0, lies: 0, takeovers: 0, ..bounds(Mode::Shared, true) };
    for bounds in
        [bounds(Mode::Exclusive, true), bounds(Mode::Exclusive, false), bounds(Mode::Shared, true), far]
    {
        match explore(&bounds) {
            Ok(states) => {
                eprintln!("{bounds:?}: {states} states");
                assert!(states > 10_000, "{states} states are not all there is to see");
            }
            Err((broken, way)) => panic!("{bounds:?}: {broken}:\n  {}", way.join("\n  ")),
        }
    }
}

/// Long enough for a conflict, a decision about it, and somebody who writes meanwhile. Among
/// several servers only what is over is taken from one, so that one has to crash first.
fn with_decisions(mode: Mode) -> Bounds {
    let is_shared = mode == Mode::Shared;
    let bounds = bounds(mode, is_shared);
    Bounds {
        attempts: 6,
        crashes: u8::from(is_shared),
        losses: 0,
        removals: 0,
        lies: 0,
        decisions: 1,
        ..bounds
    }
}

#[test]
fn p2_a_decision_of_an_operator_loses_nothing_in_any_interleaving() {
    let (alone, shared) = (with_decisions(Mode::Exclusive), with_decisions(Mode::Shared));
    for bounds in [alone, Bounds { attempts: 5, losses: 1, ..alone }, shared] {
        match explore(&bounds) {
            Ok(states) => {
                eprintln!("{bounds:?}: {states} states");
                assert!(states > 10_000, "{states} states are not all there is to see");
            }
            Err((broken, way)) => panic!("{bounds:?}: {broken}:\n  {}", way.join("\n  ")),
        }
    }
}

#[test]
fn each_part_of_the_protocol_is_needed() {
    for (without, mode, is_truthful) in [
        (Without::ReadBack, Mode::Exclusive, false),
        (Without::Nonce, Mode::Exclusive, false),
        (Without::RecordOne, Mode::Exclusive, true),
        (Without::Open, Mode::Shared, true),
        (Without::Server, Mode::Exclusive, false),
        (Without::Decision, Mode::Exclusive, false),
    ] {
        let bounds = Bounds { without, attempts: 5, ..bounds(mode, is_truthful) };
        let bounds = match without {
            Without::Decision => Bounds { without, ..with_decisions(mode) },
            _ => bounds,
        };
        match explore(&bounds) {
            Ok(states) => panic!("without {without:?} nothing broke in {states} states"),
            Err((broken, way)) => {
                eprintln!("without {without:?}: {broken} after {} steps: {way:?}", way.len())
            }
        }
    }
}
