//! The scanner against hostile servers, by `bolero`: what it says of a stream against what a slow reader of the whole
//! stream finds, for streams that are cut anywhere and broken anyhow.
//!
//! `BOLERO_RANDOM_TEST_TIME_MS=60000 cargo test --lib fuzz` goes on for longer, and `BOLERO_RANDOM_SEED` makes one case
//! again, by the seed with which it was reported.

use super::super::frames::split_off;
use super::*;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// How long each of these tests goes on, unless the environment says otherwise.
const TIME: Duration = Duration::from_secs(2);
/// The most that a scanner keeps of what the server sends, in bytes: the beginning of one message, and of one text,
/// with their buffers' growth and the replacement of what is not UTF-8.
const MOST_KEPT: usize = 8 * ERROR_PREFIX;

// ---------------------------------------------------------------------------------------------- streams

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Frontend,
    Backend,
}

use Side::{Backend, Frontend};

/// Some bytes that go one way, before the next ones go the other way.
#[derive(Clone, Debug)]
struct Part {
    side: Side,
    bytes: Vec<u8>,
}

/// The choices that a stream is made of; all are 0 once they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        split_off(&mut self.0, 1).first().copied().unwrap_or(0)
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.byte()) % all.len()]
    }

    fn bytes(&mut self, most: u8) -> Vec<u8> {
        let n = self.byte() % most;
        split_off(&mut self.0, usize::from(n)).to_vec()
    }
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// The beginning of a session that goes well.
fn login() -> Vec<Part> {
    let startup = message(0, b"\0\x03\0\0user\0alice\0\0")[1..].to_vec();
    let welcome = [message(b'R', &[0; 4]), message(b'K', b"\0\0\0\x07keys"), message(b'Z', b"I")].concat();
    vec![Part { side: Frontend, bytes: startup }, Part { side: Backend, bytes: welcome }]
}

fn an_error(choices: &mut Choices<'_>) -> Vec<u8> {
    let severity = choices.of(&["ERROR", "FATAL", "PANIC", "WARNING", ""]);
    let code = choices.of(&["C57P01\0", "C25006\0", "C26000\0", "C0A000\0", "C\0", "C1\0", ""]);
    let filling = "x".repeat(choices.of(&[0, 10, 600, 1000, 1010, 1020, 1100]));
    let forms =
        [format!("S{severity}\0"), format!("V{severity}\0"), format!("S{severity}\0V{severity}\0"), String::new()];
    let severity = &forms[usize::from(choices.byte()) % forms.len()];
    let fields = match choices.byte() % 3 {
        0 => format!("M{filling}\0{severity}{code}\0"),
        _ => format!("{severity}{code}M{filling}\0\0"),
    };
    message(b'E', fields.as_bytes())
}

/// What a client sends and a server answers, well or ill.
fn exchange(choices: &mut Choices<'_>, parts: &mut Vec<Part>) {
    let status = choices.of(b"IIIIITE?");
    let ready = message(b'Z', &[status]);
    let batch = |tags: &[u8]| tags.iter().flat_map(|&tag| message(tag, b"")).collect::<Vec<_>>();
    let mut say = |side, bytes: Vec<u8>| parts.push(Part { side, bytes });
    match choices.byte() % 16 {
        0 => {
            say(Frontend, message(b'Q', b"select\0"));
            say(Backend, [batch(b"TDC"), ready].concat());
        }
        1 => {
            say(Frontend, batch(b"PBDES"));
            say(Backend, [batch(b"12TDC"), ready].concat());
        }
        2 => {
            say(Frontend, batch(b"BES"));
            say(Backend, [an_error(choices), ready].concat());
        }
        3 => {
            say(Frontend, batch(b"CS"));
            say(Backend, [batch(b"3"), ready].concat());
        }
        4 => {
            say(Frontend, batch(b"PBES"));
            say(Backend, batch(b"12G"));
            say(Frontend, batch(b"ddcS"));
            say(Backend, [batch(b"C"), ready].concat());
        }
        5 => {
            say(Frontend, message(b'Q', b"copy\0"));
            say(Backend, batch(b"G"));
            say(Frontend, batch(b"ddc"));
            say(Backend, [batch(b"C"), ready].concat());
        }
        // From here on one side goes on by itself.
        6 => say(Frontend, message(choices.of(b"QFSPBDECHdcfXp"), b"")),
        7 | 8 => say(Backend, message(choices.of(b"123CDTIGHWcdnstNAvRK?Z"), &choices.bytes(8))),
        9 => say(Backend, ready),
        10 => say(Backend, message(choices.of(b"NAS"), &choices.bytes(80))),
        11 | 12 => say(Backend, an_error(choices)),
        13 => say(choices.of(&[Frontend, Backend]), choices.bytes(40)),
        14 => {
            let length = choices.of(&[0, 3, -1, i32::MAX, i32::MIN, 4, 5, 6, 0x0100_0004]);
            say(Backend, [&[choices.of(b"ZENASDK")][..], &length.to_be_bytes()].concat());
        }
        _ => {
            let parameter = choices.of(&["in_hot_standby", "default_transaction_read_only", "", "TimeZone"]);
            say(Backend, message(b'S', format!("{parameter}\0{}\0", choices.of(&["on", "off", ""])).as_bytes()));
        }
    }
}

/// A stream, as these choices say, of which some parts are broken.
fn stream(choices: &mut Choices<'_>) -> Vec<Part> {
    let mut parts = if choices.byte() % 8 == 0 { Vec::new() } else { login() };
    while !choices.0.is_empty() && parts.len() < 40 {
        exchange(choices, &mut parts);
        let Some(last) = parts.last_mut().filter(|part| !part.bytes.is_empty()) else { continue };
        let at = |choices: &mut Choices<'_>| usize::from(choices.byte()) % last.bytes.len();
        match choices.byte() {
            0..8 => {
                let at = at(choices);
                last.bytes[at] ^= choices.byte();
            }
            8..14 => last.bytes.truncate(at(choices)),
            14..18 => last.bytes.extend_from_within(at(choices)..),
            18..20 => last.side = Frontend,
            _ => {}
        }
    }
    parts
}

// ---------------------------------------------------------------------------------------------- the slow reader

/// What the slow reader finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Every request was answered to its end, and no transaction is open.
    Idle,
    InTransaction,
    Failed,
    /// Anything else.
    NotKnown,
    /// No client does this, so what follows from it does not matter.
    NoSuchClient,
}

/// A message.
struct Whole {
    side: Side,
    tag: u8,
    body: Vec<u8>,
    /// The frontend had sent the beginning of another one when this one ended.
    beside_half: bool,
}

/// All messages of both sides, in the order in which they ended, and whether there is the beginning of another one.
/// `None`: some bytes are no message.
fn messages(parts: &[Part]) -> Option<(Vec<Whole>, bool)> {
    let mut all = Vec::new();
    // The first message of a frontend has no tag.
    let (mut frontend, mut backend) = (vec![STARTUP], Vec::new());
    for part in parts {
        let bytes = if part.side == Frontend { &mut frontend } else { &mut backend };
        bytes.extend(&part.bytes);
        let mut ended = Vec::new();
        while bytes.len() >= 5 {
            let length = i32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
            let length = usize::try_from(length).ok().filter(|&length| length >= 4)?;
            if bytes.len() < 1 + length {
                break;
            }
            let message = bytes.drain(..1 + length).collect::<Vec<_>>();
            ended.push((message[0], message[5..].to_vec()));
        }
        let beside_half = !frontend.is_empty();
        all.extend(ended.into_iter().map(|(tag, body)| Whole { side: part.side, tag, body, beside_half }));
    }
    let half = !frontend.is_empty() || !backend.is_empty();
    Some((all, half))
}

/// What is so at the end of this stream, by all of its messages from the first to the last.
fn read_slowly(parts: &[Part]) -> Found {
    #[derive(PartialEq)]
    enum Kind {
        Simple,
        Batch,
        Closes,
    }
    let Some((messages, half)) = messages(parts) else { return Found::NotKnown };
    let mut requests = Vec::new();
    let (mut answered, mut batch, mut in_copy) = (0, Vec::new(), false);
    let mut found = Found::NotKnown;
    // How many bytes came before the first `ReadyForQuery`.
    let (mut logged_in, mut of_login) = (false, 0);
    for Whole { side, tag, body, beside_half } in messages {
        match (side, tag) {
            (Frontend, STARTUP | b'Q' | b'F') if batch.is_empty() => requests.push(Kind::Simple),
            (Frontend, STARTUP | b'Q' | b'F') => return Found::NoSuchClient,
            (Frontend, b'S') => {
                let closes = !batch.is_empty() && batch.iter().all(|&tag| tag == b'C');
                requests.push(if closes { Kind::Closes } else { Kind::Batch });
                batch.clear();
            }
            (Frontend, b'd' | b'c' | b'f') if in_copy => {}
            // The server skips it, and answers to the `Sync` behind it.
            (Frontend, b'd' | b'c' | b'f') => return Found::NotKnown,
            (Frontend, b'P' | b'B' | b'D' | b'E' | b'H' | b'C') => batch.push(tag),
            (Frontend, b'p') if !logged_in => {}
            (Frontend, _) => return Found::NoSuchClient,
            (Backend, b'Z') => {
                found = match &*body {
                    b"I" => Found::Idle,
                    b"T" => Found::InTransaction,
                    b"E" => Found::Failed,
                    _ => Found::NotKnown,
                };
                if answered == requests.len() || (!logged_in && found != Found::Idle) {
                    return Found::NotKnown;
                }
                answered += 1;
                (logged_in, in_copy) = (true, false);
            }
            (Backend, b'N' | b'A' | b'S') => {}
            (Backend, tag) => {
                let asked = answered < requests.len() || in_copy || beside_half || !batch.is_empty();
                if !asked {
                    return Found::NotKnown;
                }
                if tag == b'E' {
                    // How bad it is must be said, to its end, in the part that is kept: two words that contradict each
                    // other may stand in it and behind it.
                    let kept = &body[..body.len().min(ERROR_PREFIX)];
                    let whole = kept.split_inclusive(|&b| b == 0).filter_map(|field| field.strip_suffix(&[0]));
                    let field = |key| whole.clone().find_map(|field| field.strip_prefix(&[key]));
                    let goes_on = !matches!(field(b'V').or(field(b'S')), None | Some(b"FATAL" | b"PANIC"));
                    if in_copy || !goes_on {
                        return Found::NotKnown;
                    }
                }
                if tag == b'C' && in_copy {
                    in_copy = false;
                    // The `Sync` behind the COPY was not sent yet.
                    if answered == requests.len() {
                        batch.push(b'd');
                    }
                }
                if tag == b'G' {
                    in_copy = true;
                    // The server ignores the `Sync` of the batch, which it gets in the COPY.
                    answered += usize::from(requests.get(answered) == Some(&Kind::Batch));
                }
            }
        }
        if side == Backend && !logged_in {
            of_login += 5 + body.len();
            if of_login > LONGEST_LOGIN || body.len() > LONGEST_LOGIN_MESSAGE {
                return Found::NotKnown;
            }
        }
    }
    let unanswered = requests[answered..].iter().any(|kind| *kind != Kind::Closes);
    // A `Close` cannot fail, and nobody waits for it.
    let begun = batch.iter().any(|&tag| tag != b'C');
    if half || unanswered || begun || in_copy { Found::NotKnown } else { found }
}

// ---------------------------------------------------------------------------------------------- the scanner

/// A scanner as a [`Tap`](super::super::tap::Tap) has it, which ends the stream at a fault of the login.
struct Tapped(Scanner);

impl Tapped {
    fn pass(&mut self, side: Side, bytes: &[u8]) {
        let Tapped(scanner) = self;
        match side {
            _ if scanner.fault().is_some() => {}
            Frontend => scanner.sent(bytes),
            Backend => scanner.received(bytes),
        }
        if scanner.fault().is_some() {
            scanner.ended();
        }
    }

    /// Whether both know the same. After a fault of the login that is the fault: what came behind it in the same piece is
    /// not passed on, and of a plain text only as much is seen as came with its beginning.
    fn agrees_with(&self, other: &Tapped) -> bool {
        match (self.0.fault(), other.0.fault()) {
            (Some(Fault::PlainText(_)), Some(Fault::PlainText(_))) => true,
            (None, None) => self.0 == other.0,
            (one, other) => one == other,
        }
    }

    fn kept(&self) -> usize {
        let Tapped(scanner) = self;
        let of_fault = match scanner.fault() {
            Some(Fault::PlainText(text)) => text.capacity(),
            _ => 0,
        };
        scanner.backend.kept() + scanner.fatal_text.as_ref().map_or(0, String::capacity) + of_fault
    }
}

/// How often a connection was rightly called idle, in a transaction, failed.
static SEEN: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];

/// Passes a stream to two scanners, to one in pieces of these lengths, and compares them with each other and with the
/// slow reader after each part.
fn compare(parts: &[Part], cuts: &[u8]) {
    let (mut whole, mut cut) = (Tapped(Scanner::new()), Tapped(Scanner::new()));
    let mut cuts = cuts.iter().chain(&[1]).cycle().map(|&cut| usize::from(cut) + 1);
    let mut sent = 0;
    for (i, part) in parts.iter().enumerate() {
        whole.pass(part.side, &part.bytes);
        let mut rest = &*part.bytes;
        while !rest.is_empty() {
            cut.pass(part.side, split_off(&mut rest, cuts.next().unwrap()));
            assert!(cut.kept() <= MOST_KEPT, "{} bytes are kept", cut.kept());
        }
        assert!(whole.agrees_with(&cut), "how it is cut matters: {:?}, {:?}", whole.0, cut.0);
        // Each message of the frontend has five bytes, of which the first lacks one.
        sent += if part.side == Frontend { part.bytes.len() } else { 0 };
        assert!(whole.0.pending.len() <= (sent + 1) / 5, "the server makes requests");

        let found = read_slowly(&parts[..=i]);
        let scanner = &whole.0;
        if found == Found::NoSuchClient {
            return;
        }
        if scanner.is_idle() || scanner.is_clean() {
            assert_eq!(found, Found::Idle, "it is called idle: {scanner:?}");
        }
        let seen = match (found, scanner.status()) {
            (Found::Idle, Status::Idle) => 0,
            (Found::InTransaction, Status::InTransaction) => 1,
            (Found::Failed, Status::Failed) => 2,
            (Found::NotKnown, _) => continue,
            (_, status) => panic!("{found:?} is taken for {status:?}"),
        };
        // The scanner may be more careful than the reader. How often it was not is counted.
        if !scanner.is_lost() && !scanner.is_busy() {
            SEEN[seen].fetch_add(1, Relaxed);
        }
    }
}

#[test]
fn nothing_is_called_clean_that_a_slow_reader_does_not_find_idle() {
    bolero::check!().with_max_len(800).with_test_time(TIME).for_each(|bytes: &[u8]| {
        let mut choices = Choices(bytes);
        let cuts = choices.bytes(20);
        compare(&stream(&mut choices), &cuts);
    });
    let seen = SEEN.each_ref().map(|n| n.load(Relaxed));
    assert!(seen.iter().all(|&n| n > 0), "it was never at rest: {seen:?}");
}

#[test]
fn noise_is_never_clean_and_never_kept() {
    bolero::check!().with_max_len(4096).with_test_time(TIME).for_each(|bytes: &[u8]| {
        let mut choices = Choices(bytes);
        let mut parts = if choices.byte() % 2 == 0 { Vec::new() } else { login() };
        let cuts = choices.bytes(20);
        while !choices.0.is_empty() {
            parts.push(Part { side: choices.of(&[Frontend, Backend, Backend]), bytes: choices.bytes(u8::MAX) });
        }
        compare(&parts, &cuts);
    });
}

/// What never ends is not kept either: neither one message that is as long as can be, nor any number of short ones.
#[test]
fn an_endless_stream_is_not_kept() {
    const MUCH: usize = 4 << 20;
    let long = |tag: u8| [&[tag][..], &i32::MAX.to_be_bytes()].concat();
    let streams = [
        (vec![], message(b'N', b"SNOTICE\0VNOTICE\0C00000\0Mso it goes\0\0")),
        (vec![], message(b'S', b"a\0b\0")),
        (vec![], message(b'A', b"\0\0\0\x07channel\0hello\0")),
        (vec![], message(b'R', b"\0\0\0\x03")),
        (vec![], message(b'E', &[b"SERROR\0VERROR\0CXX000\0M".to_vec(), vec![b'x'; 3000]].concat())),
        (vec![], message(b'Z', b"I")),
        (vec![], message(b'G', b"")),
        (long(b'E'), vec![b'x'; 1 << 16]),
        (long(b'S'), vec![b'x'; 1 << 16]),
        (long(b'D'), vec![b'x'; 1 << 16]),
        (long(b'Z'), vec![b'I'; 1 << 16]),
    ];
    for (first, again) in streams {
        let mut tapped = Tapped(Scanner::new());
        login().iter().for_each(|part| tapped.pass(part.side, &part.bytes));
        tapped.pass(Frontend, &message(b'Q', b"select\0"));
        tapped.pass(Backend, &first);
        let piece = again.repeat((1 << 16) / again.len());
        for _ in 0..MUCH / piece.len() {
            tapped.pass(Backend, &piece);
            assert!(tapped.kept() <= MOST_KEPT && tapped.0.pending.len() <= 1, "{:?}", tapped.0);
            assert!(!tapped.0.is_clean(), "{:?}", tapped.0);
        }
    }
}
