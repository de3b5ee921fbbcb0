
// What no rule and no storage of the tables has: three states, and a store that shows its key.
namespace flatstep {

struct ThreeStates {
  enum { NUM_STATES = 3, READS_STEP = 1 };
  FLATSTEP_HYPERPARAMETERS(a, b, c, d, e, f, g)

  struct Constants {
    float rate, step, p, unused;
    float first[3], second[3], third[3];
  };

  static Constants prepare(Hyperparameters h, float rate, Step step) {
    return {
        rate,
        float(step),
        h.g.value,
        0.0f,
        {h.a.value, h.b.value, h.c.value},
        {h.a.one_minus, h.b.one_minus, h.c.one_minus},
        {h.d.log.hi, h.e.log.lo, h.f.log.hi}};
  }

  static Element<3> update(Constants c, Element<3> e, float g) {
    e.p += c.rate * g + c.p + c.step;
    for (int k = 0; k < 3; ++k) {
      e.state[k] += c.first[k] * g + c.second[k] + c.third[k];
    }
    return e;
  }
};

// For which a zero does not stay one.
struct Shift {
  enum { NUM_STATES = 1, READS_STEP = 0 };
  FLATSTEP_HYPERPARAMETERS(by)

  struct Constants {
    float by;
  };

  static Constants prepare(Hyperparameters h, float, Step) {
    return {h.by.value};
  }

  static Element<1> update(Constants c, Element<1> e, float) {
    e.p += c.by;
    e.state[0] += c.by;
    return e;
  }
};

struct Keyed {
  typedef uint Stored;
  static float load(uint) {
    return 0.0f;
  }
  static uint store(float, RoundingKey key) {
    return key.number;
  }
};

}  // namespace flatstep
